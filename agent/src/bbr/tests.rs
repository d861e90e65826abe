//! Tests the scanner with a table, and against serde_json on arbitrary documents, mutated and cut at arbitrary offsets.

use std::fmt;

use proptest::prelude::*;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::*;

fn scan(body: &[u8]) -> Result<Summary, JsonError> {
    let mut scanner = ModelScanner::new();
    scanner.feed(body)?;
    scanner.finish()
}

/// Scans the same body, cut before each of `cuts`.
fn scan_cut(body: &[u8], cuts: &[usize]) -> Result<Summary, JsonError> {
    let mut scanner = ModelScanner::new();
    let mut from = 0;
    for &cut in cuts {
        let cut = cut.clamp(from, body.len());
        scanner.feed(&body[from..cut])?;
        from = cut;
    }
    scanner.feed(&body[from..])?;
    scanner.finish()
}

fn every_cut(body: &[u8]) -> Vec<usize> {
    (1..body.len()).collect()
}

fn model(body: &str) -> Model {
    scan(body.as_bytes()).unwrap().model
}

fn found(model: &str) -> Model {
    Model::Found(model.into())
}

fn not_a_string(text: &str) -> Model {
    Model::NotAString(text.into())
}

#[test]
fn top_level_model_is_found() {
    let long = "x".repeat(MAX_MODEL);
    for (body, expected) in [
        (r#"{"model":"llama","prompt":"hi"}"#, found("llama")),
        (" \r\n\t{ \"prompt\" : [ 1 , {\"model\":\"no\"} ] , \"model\" : \"yes\" } \n", found("yes")),
        (r#"{"mod\u0065l":"a"}"#, found("a")),
        (r#"{"model":"\"\\\/\té\u00e9\ud83d\ude00😀"}"#, found("\"\\/\téé😀😀")),
        (r#"{"model":""}"#, found("")),
        (&format!(r#"{{"model":"{long}"}}"#), found(&long)),
        (r#"{"Model":"a","model ":"b","modell":"c","":"d"}"#, Model::NotYet),
        (r#"{"a":{"model":"b"},"model2":1}"#, Model::NotYet),
        (r#"{"model\ud800":"b"}"#, Model::NotYet),
        (r#"{"model":null}"#, not_a_string("null")),
        (r#"{"model": -1.5e+3 }"#, not_a_string("-1.5e+3")),
        (r#"{"model":{"model": ["x", "]"]},"a":1}"#, not_a_string(r#"{"model": ["x", "]"]}"#)),
        (r#"{"model":[]}"#, not_a_string("[]")),
        ("{}", Model::NotYet),
        ("[]", Model::NotYet),
        (r#"["model","x"]"#, Model::NotYet),
        (r#"[{"model":"x"}]"#, Model::NotYet),
        ("\"model\"", Model::NotYet),
        ("12", Model::NotYet),
        (" null ", Model::NotYet),
    ] {
        assert_eq!(model(body), expected, "{body}");
        assert_eq!(
            scan_cut(body.as_bytes(), &every_cut(body.as_bytes())).unwrap().model,
            expected,
            "{body}, byte by byte"
        );
    }
}

#[test]
fn long_non_string_model_is_cut_at_a_character() {
    let body = format!("{{\"model\":[\"{}\"]}}", "é".repeat(MAX_MODEL));
    assert_eq!(model(&body), not_a_string(&format!("[\"{}…", "é".repeat((MAX_MODEL - 2) / 2))));
}

#[test]
fn top_level_boolean_stream_is_found() {
    for (body, expected) in [
        (r#"{"stream":true}"#, Some(true)),
        (r#"{"model":"a","stream":false,"b":true}"#, Some(false)),
        (r#"{"stream":"true"}"#, None),
        (r#"{"stream":[true]}"#, None),
        (r#"{"a":{"stream":true}}"#, None),
        (r#"{"stream":true,"stream":false}"#, Some(false)),
        (r#"{"stream":true,"stream":null}"#, None),
    ] {
        assert_eq!(scan(body.as_bytes()).unwrap().stream, expected, "{body}");
    }
}

#[test]
fn model_is_known_as_soon_as_its_value_is_complete() {
    let mut scanner = ModelScanner::new();
    scanner.feed(br#"{"model":"lla"#).unwrap();
    assert_eq!(scanner.model(), &Model::NotYet);
    scanner.feed(br#"ma""#).unwrap();
    assert_eq!(scanner.model(), &found("llama"));
    scanner.feed(br#","stream":tru"#).unwrap();
    assert_eq!(scanner.found.stream, None);
    scanner.feed(b"e").unwrap();
    assert_eq!(scanner.found.stream, Some(true));
}

#[test]
fn errors_name_offset_found_and_expected() {
    for (body, expected) in [
        (&b""[..], "byte 0: found the end of the body, expected a value"),
        (b"\xef\xbb\xbf{}", "byte 0: found byte 0xef, expected a value"),
        (b"{\"a\":1,}", "byte 7: found `}`, expected `\"` of a key"),
        (b"{,}", "byte 1: found `,`, expected `\"` of a key, or `}`"),
        (b"[1 2]", "byte 3: found `2`, expected `,` or `]`"),
        (b"[1}", "byte 2: found `}`, expected `,` or `]`"),
        (b"[,", "byte 1: found `,`, expected a value or `]`"),
        (b"{\"a\" 1}", "byte 5: found `1`, expected `:`"),
        (b"{\"a\":1]", "byte 6: found `]`, expected `,` or `}`"),
        (b"{} x", "byte 3: found `x`, expected the end of the document"),
        (b"tru", "byte 3: found the end of the body, expected `true`, `false` or `null`"),
        (b"[nulL]", "byte 4: found `L`, expected `true`, `false` or `null`"),
        (b"-", "byte 1: found the end of the body, expected a digit"),
        (b"[1.]", "byte 3: found `]`, expected a digit"),
        (b"[1e]", "byte 3: found `]`, expected a digit, `+` or `-`"),
        (b"01", "byte 1: found `1`, expected the end of the document"),
        (b"\"a\nb\"", "byte 2: found byte 0x0a, expected a character of a string, in UTF-8 and above 0x1f, or `\"`"),
        (b"\"\\x\"", "byte 2: found `x`, expected one of `\"\\/bfnrtu` after a backslash"),
        (b"\"\\u12g4\"", "byte 5: found `g`, expected four hexadecimal digits after `\\u`"),
        (b"\"\xc3(\"", "byte 2: found `(`, expected the rest of a UTF-8 character"),
        (b"\"\xed\xa0\x80\"", "byte 2: found byte 0xa0, expected the rest of a UTF-8 character"),
        (b"{\"model\":\"\\ud800\"}", "byte 9: found a model with a lone surrogate, expected Unicode characters"),
        (
            b"{\"model\":\"a\\u0000\"}",
            "byte 9: found a model with a control character, expected visible characters and blanks",
        ),
        (
            b"{\"model\":\"a\\r\\nx: 1\"}",
            "byte 9: found a model with a control character, expected visible characters and blanks",
        ),
        (b"{\"model\":1,\"model\":1}", "byte 11: found a second top-level key \"model\", expected one model"),
        (
            b"{\"model\":\"a\", \"\\u006dodel\":\"b\"}",
            "byte 14: found a second top-level key \"model\", expected one model",
        ),
    ] {
        let name = String::from_utf8_lossy(body);
        assert_eq!(scan(body).unwrap_err().to_string(), expected, "{name}");
        assert_eq!(scan_cut(body, &every_cut(body)).unwrap_err().to_string(), expected, "{name}, byte by byte");
    }
}

#[test]
fn error_is_repeated_by_later_calls() {
    let mut scanner = ModelScanner::new();
    let error = scanner.feed(b"}").unwrap_err();
    assert_eq!(scanner.feed(b"{}").unwrap_err(), error);
    assert_eq!(scanner.finish().unwrap_err(), error);
}

#[test]
fn model_longer_than_the_limit_is_refused() {
    let body = format!(r#"{{"model":"{}"}}"#, "x".repeat(MAX_MODEL + 1));
    assert_eq!(
        scan(body.as_bytes()).unwrap_err().to_string(),
        "byte 9: found a longer model, expected at most 256 bytes"
    );
}

#[test]
fn depth_limit_is_that_of_serde_json() {
    let nested = |open: &str, close: &str, depth| open.repeat(depth) + "1" + &close.repeat(depth);
    for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("{\"model\":", "}")] {
        for depth in [1, usize::from(MAX_DEPTH), usize::from(MAX_DEPTH) + 1] {
            let body = nested(open, close, depth);
            let ours = scan(body.as_bytes());
            assert_eq!(ours.is_ok(), serde_json::from_str::<Value>(&body).is_ok(), "{depth} of {open}");
            assert_eq!(ours.is_err_and(|error| error.found == Found::TooDeep), depth > usize::from(MAX_DEPTH));
        }
    }
}

#[test]
fn lone_surrogates_outside_the_model_pass() {
    let body = br#"{"model":"a","prompt":"cut \ud83d","x":"\udc00\ud800\u0041"}"#;
    assert_eq!(scan(body).unwrap().model, found("a"));
    assert!(serde_json::from_slice::<Value>(body).is_err(), "serde_json cannot represent it");
}

/// The decoded top-level keys, duplicates included.
struct Keys(Vec<String>);

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Keys;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
                let mut keys = Vec::new();
                while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                    keys.push(key);
                }
                Ok(Keys(keys))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// `IgnoredAny` is serde_json's bare grammar: like our scanner and unlike `Value` it accepts lone surrogates and huge
/// exponents, but it does not check UTF-8. The documents here are shallow.
fn agrees_with_serde_json(body: &[u8], cuts: &[usize]) {
    let ours = scan(body);
    assert_eq!(scan_cut(body, cuts), ours, "the cuts change the result");
    let valid = serde_json::from_slice::<IgnoredAny>(body).is_ok() && std::str::from_utf8(body).is_ok();
    let summary = match ours {
        Ok(summary) => summary,
        Err(JsonError { found: Found::Byte(_) | Found::EndOfInput, .. }) => {
            return assert!(!valid, "refused, but serde_json accepts it");
        }
        Err(JsonError { found: Found::SecondModel, .. }) => {
            if let Ok(Keys(keys)) = serde_json::from_slice(body) {
                assert!(keys.iter().filter(|key| *key == "model").count() > 1);
            }
            return;
        }
        Err(JsonError { found: Found::ControlCharacter, .. }) => {
            if let Ok(Keys(keys)) = serde_json::from_slice(body) {
                assert!(keys.iter().any(|key| key == "model"));
            }
            return;
        }
        Err(JsonError { found: Found::LoneSurrogate, .. }) => {
            return assert!(serde_json::from_slice::<Value>(body).is_err());
        }
        Err(error) => panic!("unexpected error: {error}"),
    };
    assert!(valid, "accepted, but serde_json refuses it");
    let Ok(document) = serde_json::from_slice::<Value>(body) else { return };
    match (document.get("model"), summary.model) {
        (None, ours) => assert_eq!(ours, Model::NotYet),
        (Some(Value::String(theirs)), ours) => assert_eq!(ours, Model::Found(theirs.clone())),
        (Some(theirs), Model::NotAString(text)) if !text.ends_with('…') => {
            assert_eq!(&serde_json::from_str::<Value>(&text).unwrap(), theirs);
        }
        (Some(_), ours) => assert!(matches!(ours, Model::NotAString(_))),
    }
    assert_eq!(summary.stream, document.get("stream").and_then(Value::as_bool));
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![3 => Just("model".to_owned()), 1 => Just("stream".to_owned()), 3 => "\\PC{0,8}"]
}

fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "(?s).{0,40}".prop_map(Value::from),
    ];
    let nested = leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..6).prop_map(|members| members.into_iter().collect()),
        ]
    });
    let object = prop::collection::vec((key(), nested.clone()), 0..6).prop_map(|members| members.into_iter().collect());
    prop_oneof![3 => object, 1 => nested]
}

/// Bytes to insert: mostly ones with a meaning in JSON.
fn interesting() -> impl Strategy<Value = u8> {
    prop_oneof![prop::sample::select(b"{}[],:\"\\ul0-1.eE+ \n\xc3\xa9\xed\xf0\x00".to_vec()), any::<u8>()]
}

fn mutate(body: &mut Vec<u8>, edits: &[(prop::sample::Index, u8, u8)]) {
    for (at, kind, byte) in edits {
        let at = at.index(body.len() + 1);
        match kind % 4 {
            0 => body.insert(at, *byte),
            1 if at < body.len() => body[at] = *byte,
            2 if at < body.len() => drop(body.remove(at)),
            3 if at > body.len() / 2 => body.truncate(at),
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_documents_agree_with_serde_json(
        value in document(),
        pretty: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), interesting()), 0..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut body = if pretty { serde_json::to_vec_pretty(&value) } else { serde_json::to_vec(&value) }.unwrap();
        mutate(&mut body, &edits);
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
        cuts.sort_unstable();
        agrees_with_serde_json(&body, &cuts);
        agrees_with_serde_json(&body, &every_cut(&body));
    }

    #[test]
    fn token_sequences_agree_with_serde_json(tokens in prop::collection::vec(prop::sample::select(vec![
        "{", "}", "[", "]", ",", ":", "\"", "\\", "\\u", "d83d", "\\ude00", "\\ud800", "00e9", "\"model\":", "\"str\\u0065am\":", "\"mod\\u0065l\"", "\"a\"",
        "\"a\":", "1", "0", "-", ".5", "e9", "E+", "true", "fals", "null", " ", "\n", "é", "😀", "\u{1}", "{\"model\":\"",
    ]), 0..24)) {
        let body = tokens.concat().into_bytes();
        agrees_with_serde_json(&body, &every_cut(&body));
    }
}
