//! Finds the `usage` in the end of an event's data whose beginning is not known, and builds a small event from it.
//!
//! A last event can be longer than the tail: `response.completed` has the whole response in it. Its usage comes near the end.

use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Deserializer, Map, Value};

use super::usage;

const KEY: &[u8] = b"\"usage\"";
/// The type of an event that has its usage in `response`, if the tail does not show it.
const COMPLETED: &str = "response.completed";

/// Returns the data of an event with nothing but its type, if that is known, and the usage. `end` is the end of a JSON text.
/// Returns `None` unless the usage is a member of the outermost object, or of an object in it, and has token counts.
pub(super) fn with_usage_only(end: &[u8]) -> Option<String> {
    let mut places = (0..end.len().saturating_sub(KEY.len())).rev().filter(|&at| end[at..].starts_with(KEY));
    // The last one that fits. A key inside a string has a backslash before its last quote.
    places.find_map(|at| built(&end[at + KEY.len()..]))
}

fn built(after_key: &[u8]) -> Option<String> {
    let mut rest = JsonRest(after_key);
    rest.punctuation(b':')?;
    let usage: Map<String, Value> = rest.value()?;
    usage::has_counts(&usage).then_some(())?;
    let mut kinds = [None, None];
    let mut closed = 0;
    while !rest.is_empty() {
        if rest.punctuation(b'}').is_some() {
            closed += 1;
            continue;
        }
        rest.punctuation(b',')?;
        let key: String = rest.value()?;
        rest.punctuation(b':')?;
        if key == "type" {
            // Its object is the one that `closed` objects ended in.
            *kinds.get_mut(closed)? = rest.value::<Value>()?.as_str().map(str::to_owned);
        } else {
            rest.value::<IgnoredAny>()?;
        }
    }
    let mut event = Map::new();
    let kind = kinds.into_iter().nth(usize::checked_sub(closed, 1)?)?;
    match closed {
        1 => {
            event.extend(kind.map(|kind| ("type".to_owned(), kind.into())));
            event.insert("usage".to_owned(), usage.into());
        }
        _ => {
            event.insert("type".to_owned(), kind.unwrap_or_else(|| COMPLETED.to_owned()).into());
            event.insert(
                "response".to_owned(),
                Value::Object([("usage".to_owned(), usage.into())].into_iter().collect()),
            );
        }
    }
    Some(Value::Object(event).to_string())
}

/// What follows in the JSON text.
struct JsonRest<'a>(&'a [u8]);

impl JsonRest<'_> {
    fn is_empty(&mut self) -> bool {
        self.0 = self.0.trim_ascii_start();
        self.0.is_empty()
    }

    fn punctuation(&mut self, byte: u8) -> Option<()> {
        self.0 = self.0.trim_ascii_start().strip_prefix(&[byte])?;
        Some(())
    }

    fn value<T: for<'de> Deserialize<'de>>(&mut self) -> Option<T> {
        let mut values = Deserializer::from_slice(self.0).into_iter::<T>();
        let value = values.next()?.ok()?;
        self.0 = &self.0[values.byte_offset()..];
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(end: &str) -> Option<Value> {
        with_usage_only(end.as_bytes()).map(|data| serde_json::from_str(&data).unwrap())
    }

    #[test]
    fn usage_of_cut_event_is_found_at_every_cut() {
        let usage = json!({"input_tokens": 5, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 7});
        let text = r#"an answer with \"usage\": {\"input_tokens\": 1}} and } in it"#;
        let rows = [
            (
                format!(
                    r#"{{"type":"response.completed","response":{{"output":[{{"text":"{text}"}}],"usage":{usage},"user":null,"metadata":{{"a":"}}"}}}}}}"#
                ),
                json!({"type": "response.completed", "response": {"usage": usage}}),
            ),
            (
                format!(
                    r#"{{"response":{{"output":[{{"text":"{text}"}}],"usage":{usage} , "x":[1,{{"type":"y"}}] }},"sequence_number":12,"type":"response.incomplete"}}"#
                ),
                json!({"type": "response.incomplete", "response": {"usage": usage}}),
            ),
            (
                format!(r#"{{"type":"message_delta","delta":{{"text":"{text}"}},"usage":{usage}}}"#),
                json!({"usage": usage}),
            ),
            (
                format!(r#"{{"choices":[{{"text":"{text}"}}],"usage":{usage},"type":"t"}}"#),
                json!({"type": "t", "usage": usage}),
            ),
        ];
        for (event, expected) in rows {
            let key = event.rfind("\"usage\":").unwrap();
            for cut in 1..=key {
                let Some(end) = event.get(cut..) else { continue };
                assert_eq!(found(end).as_ref(), Some(&expected), "{end}");
            }
            for cut in key + 1..event.len() {
                let Some(end) = event.get(cut..) else { continue };
                assert_eq!(found(end), None, "{end}");
            }
        }
    }

    #[test]
    fn other_members_called_usage_are_not_taken() {
        let rows = [
            // Too deep, in an array, without counts, in a text, and not an object.
            r#""usage":{"input_tokens":1}}}}"#,
            r#""usage":{"input_tokens":1}}]}"#,
            r#""usage":{"type":"object"}}}"#,
            r#"\"usage\":{\"input_tokens\":1}}}"#,
            r#""usage":"none"}}"#,
            r#""usage":null}}"#,
            // Not the end of a JSON text.
            r#""usage":{"input_tokens":1}"#,
            r#""usage":{"input_tokens":1},}"#,
            r#""usage":{"input_tokens":1}} x"#,
            r#""usage":{"input_tok"#,
            r#""usage""#,
            "",
        ];
        for end in rows {
            assert_eq!(found(end), None, "{end}");
        }
        // An earlier one that fits is taken.
        let both = r#""usage":{"input_tokens":1},"tool":{"usage":{"type":"object"}}}}"#;
        assert_eq!(
            found(both),
            Some(json!({"type": "response.completed", "response": {"usage": {"input_tokens": 1}}}))
        );
    }
}
