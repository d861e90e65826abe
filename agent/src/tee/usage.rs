//! The token counts of a response in the format of OpenAI's APIs: from the last event of a stream that has a `usage`,
//! or from the document.

use std::borrow::Cow;

use serde::Deserialize;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Empty if the response names no model.
    pub model: String,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Tokens {
    /// Aliases: chat and text completions and embeddings; the responses API.
    #[serde(alias = "input_tokens", default)]
    prompt_tokens: u64,
    #[serde(alias = "output_tokens", default)]
    completion_tokens: u64,
}

pub(super) fn of_document(text: &[u8]) -> Option<Usage> {
    let message: Message<'_> = serde_json::from_slice(text).ok()?;
    let tokens = message.usage?;
    Some(Usage {
        model: message.model.map(Cow::into_owned).unwrap_or_default(),
        input_tokens: tokens.prompt_tokens,
        output_tokens: tokens.completion_tokens,
    })
}

pub(super) fn of_events(text: &[u8]) -> Option<Usage> {
    let lines = text.rsplit(|&byte| byte == b'\n' || byte == b'\r');
    lines.filter_map(|line| line.strip_prefix(b"data:")).find_map(of_document)
}
