//! The token counts that a response reports, in the formats of OpenAI's chat completions, completions, embeddings and responses, and
//! of Anthropic's messages: from a document, or from the events of a stream.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::{Map, Value};

use super::events;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Empty if the response names no model.
    pub model: String,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// What some of a response's events report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FoundUsage {
    model: Option<String>,
    /// Whether there was a usage, with or without counts.
    usage: bool,
    input: Option<u64>,
    output: Option<u64>,
}

#[derive(Deserialize)]
struct UsageReport<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Option<JsonObject<Tokens>>,
}

/// An event whose response is in a member.
#[derive(Deserialize)]
struct UsageEvent<'a> {
    /// Of the responses API.
    #[serde(borrow, default)]
    response: Option<JsonObject<UsageReport<'a>>>,
    /// Of Anthropic's `message_start`.
    #[serde(borrow, default)]
    message: Option<JsonObject<UsageReport<'a>>>,
}

#[derive(Deserialize)]
struct Tokens {
    #[serde(default)]
    prompt_tokens: Option<u64>,
    #[serde(default)]
    input_tokens: Option<u64>,
    #[serde(default)]
    completion_tokens: Option<u64>,
    #[serde(default)]
    output_tokens: Option<u64>,
}

/// A JSON object. The structs alone would also accept an array with the values of their members.
struct JsonObject<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for JsonObject<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfObject<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfObject<T> {
            type Value = JsonObject<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<JsonObject<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(JsonObject)
            }
        }

        deserializer.deserialize_map(OfObject(PhantomData))
    }
}

/// The names of the counts.
const COUNTS: [&str; 4] = ["prompt_tokens", "input_tokens", "completion_tokens", "output_tokens"];

/// Whether the usage has a count.
pub(super) fn has_counts(usage: &Map<String, Value>) -> bool {
    COUNTS.iter().any(|name| usage.get(*name).is_some_and(Value::is_u64))
}

/// Reads a document.
pub(super) fn of_document(text: &[u8]) -> FoundUsage {
    let message: Option<JsonObject<UsageReport<'_>>> = serde_json::from_slice(text).ok();
    message.map_or_else(FoundUsage::default, |JsonObject(message)| message.into())
}

/// Reads events. Of several counts, the last one counts.
pub(super) fn of_events(text: &[u8]) -> FoundUsage {
    let mut found = FoundUsage::default();
    for data in events::data_from_last(text) {
        found = found.or(of_event(&data));
        if found.is_complete() {
            break;
        }
    }
    found
}

/// Reads the data of one event.
pub(super) fn of_event(data: &[u8]) -> FoundUsage {
    let found = of_document(data);
    if found.usage {
        return found;
    }
    let event: Option<JsonObject<UsageEvent<'_>>> = serde_json::from_slice(data).ok();
    let message = event.and_then(|JsonObject(event)| event.response.or(event.message));
    found.or(message.map_or_else(FoundUsage::default, |JsonObject(message)| message.into()))
}

impl From<UsageReport<'_>> for FoundUsage {
    fn from(message: UsageReport<'_>) -> Self {
        let (usage, tokens) = (message.usage.is_some(), message.usage.map(|JsonObject(tokens)| tokens));
        Self {
            model: message.model.filter(|model| !model.is_empty()).map(Cow::into_owned),
            usage,
            input: tokens.as_ref().and_then(|tokens| tokens.prompt_tokens.or(tokens.input_tokens)),
            output: tokens.as_ref().and_then(|tokens| tokens.completion_tokens.or(tokens.output_tokens)),
        }
    }
}

impl FoundUsage {
    /// Adds what only the other one has.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            model: self.model.or(other.model),
            usage: self.usage || other.usage,
            input: self.input.or(other.input),
            output: self.output.or(other.output),
        }
    }

    fn is_complete(&self) -> bool {
        self.model.is_some() && self.input.is_some() && self.output.is_some()
    }

    /// `None` if there was no usage.
    pub(super) fn usage(self) -> Option<Usage> {
        self.usage.then(|| Usage {
            model: self.model.unwrap_or_default(),
            input_tokens: self.input.unwrap_or_default(),
            output_tokens: self.output.unwrap_or_default(),
        })
    }

    /// Whether there was a usage.
    pub(super) fn has_usage(&self) -> bool {
        self.usage
    }
}
