//! The scan of a JSON body for its model, and its abridgement for an EPP, cut anywhere, compared with serde_json.

use penstock_agent::parts::{
    Abridged, Abridger, Difference, Found, JsonError, Model, ModelScanner, Summary, Whole, difference,
};
use serde_json::Value;

use crate::input;

pub fn run(data: &[u8]) {
    let (mut choices, body) = input::split(data, 3);
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let ours = scan(std::iter::once(body));
    assert_eq!(scan(input::pieces(body, lengths)), ours, "the result depends on the cut");
    abridge(body, lengths, ours.is_ok());

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
        (Err(JsonError { found: Found::SecondModel | Found::LongModel | Found::ControlCharacter, .. }), _) => return,
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

/// Abridges the body as if its texts were long.
fn abridge(body: &[u8], lengths: [u8; 3], is_json: bool) {
    let limit = body.len() / 3;
    let ours = abridged(limit, std::iter::once(body));
    // Of two reasons to send the body whole, the cut decides which is found first.
    assert_eq!(
        abridged(limit, input::pieces(body, lengths)).ok(),
        ours.clone().ok(),
        "the abridgement depends on the cut"
    );
    let Abridged { body: short, model } = match ours {
        Ok(abridged) => abridged,
        Err(Whole::NotJson) => return assert!(!is_json, "a document is refused"),
        Err(Whole::Structure | Whole::Short) => return,
    };
    assert!(is_json && short.len() < body.len() && short.len() <= 2 * limit);
    assert!(scan(std::iter::once(&*short)).is_ok(), "the abridged body is not JSON");
    assert_eq!(difference(&short, body), Difference::Other);
    if let Some(model) = model {
        let at = &body[model.at.start as usize..model.at.end as usize];
        assert_eq!(serde_json::from_slice::<String>(at).ok(), Some(model.name));
    }
}

fn abridged<'d>(limit: usize, pieces: impl Iterator<Item = &'d [u8]>) -> Result<Abridged, Whole> {
    let mut abridger = Abridger::new(limit);
    for piece in pieces {
        abridger.feed(piece)?;
    }
    abridger.finish()
}
