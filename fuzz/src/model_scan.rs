//! The scan of a JSON body for its model, cut anywhere, compared with serde_json.

use penstock_agent::bbr::{Found, JsonError, Model, ModelScanner, Summary};
use serde_json::Value;

use crate::input;

pub fn run(data: &[u8]) {
    let (mut choices, body) = input::split(data, 3);
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let ours = scan(std::iter::once(body));
    assert_eq!(scan(input::pieces(body, lengths)), ours, "the result depends on the cut");

    // `Value` refuses some valid JSON: lone surrogates, and numbers beyond f64. The scanner does not check those.
    let theirs = serde_json::from_slice::<Value>(body);
    let summary = match (ours, &theirs) {
        (Ok(summary), _) => summary,
        (
            Err(JsonError {
                found: Found::Byte(_) | Found::EndOfInput | Found::LoneSurrogate | Found::TooDeep, ..
            }),
            theirs,
        ) => {
            return assert!(theirs.is_err(), "serde_json accepts what the scanner refuses");
        }
        // Refused although it is valid JSON.
        (Err(JsonError { found: Found::SecondModel | Found::LongModel, .. }), _) => return,
    };
    let Ok(document) = theirs else {
        let grammatical =
            serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok() && std::str::from_utf8(body).is_ok();
        return assert!(grammatical, "the scanner accepts invalid JSON");
    };
    match (document.get("model"), summary.model) {
        (None, ours) => assert_eq!(ours, Model::NotYet),
        (Some(Value::String(theirs)), ours) => assert_eq!(ours, Model::Found(theirs.clone())),
        (Some(_), ours) => assert!(matches!(ours, Model::NotAString(_)), "{ours:?}"),
    }
    assert_eq!(summary.stream, document.get("stream").and_then(Value::as_bool));
}

fn scan<'d>(pieces: impl Iterator<Item = &'d [u8]>) -> Result<Summary, JsonError> {
    let mut scanner = ModelScanner::new();
    for piece in pieces {
        scanner.feed(piece)?;
    }
    scanner.finish()
}
