//! Tests `Naming` with a table of bodies and against serde_json.

use http::{HeaderValue, header};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::bbr::ModelHeaders;

fn headers(content_type: Option<&str>) -> HeaderMap {
    let kind = content_type.map(|kind| (header::CONTENT_TYPE, HeaderValue::from_str(kind).unwrap()));
    kind.into_iter().collect()
}

fn rule(missing_model: MissingModel) -> Bbr {
    Bbr { missing_model, ..Bbr::default() }
}

/// The model of a body that arrives in pieces of this size, and the counters found, not found and empty.
fn named(
    bbr: &Bbr,
    content_type: Option<&str>,
    body: &[u8],
    piece: usize,
) -> (Result<Option<String>, String>, [u64; 3]) {
    let metrics = Metrics::new(&[]);
    let mut naming = Naming::new(bbr, &headers(content_type), None, !body.is_empty(), &metrics);
    let read = body.chunks(piece).try_for_each(|piece| naming.feed(piece)).and_then(|()| naming.end());
    let read = read.map(|()| naming.model(bbr).map(str::to_owned)).map_err(|error| error.to_string());
    assert!(read.is_err() || naming.is_settled());
    let text = metrics.encode();
    let count = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("penstock_bbr_{name}_total ")));
        line.unwrap().parse().unwrap()
    };
    (read, ["success", "body_field_not_found", "body_field_empty"].map(count))
}

fn json(bbr: &Bbr, body: &str) -> (Result<Option<String>, String>, [u64; 3]) {
    named(bbr, Some("application/json"), body.as_bytes(), 3)
}

const FOUND: [u64; 3] = [1, 0, 0];
const NOT_FOUND: [u64; 3] = [0, 1, 0];
const EMPTY: [u64; 3] = [0, 0, 1];
const UNREAD: [u64; 3] = [0, 0, 0];

#[test]
fn json_values_name_a_model_or_do_not() {
    let long = "1".repeat(300);
    let rows = [
        (r#"{"model":"llama"}"#, Some("llama"), FOUND),
        (r#"{"model":"null"}"#, Some("null"), FOUND),
        (r#"{"model":"[x"}"#, Some("[x"), FOUND),
        (r#"{"a":1,"model": 7 }"#, Some("7"), FOUND),
        (r#"{"model":-1.50e+3}"#, Some("-1.50e+3"), FOUND),
        (r#"{"model":true}"#, Some("true"), FOUND),
        (r#"{"model":""}"#, None, EMPTY),
        (r#"{"model":null}"#, None, NOT_FOUND),
        (r#"{"model":["llama"]}"#, None, NOT_FOUND),
        (r#"{"model":{"model":"llama"}}"#, None, NOT_FOUND),
        (&format!(r#"{{"model":{long}}}"#), None, NOT_FOUND),
        (r#"{"prompt":"p"}"#, None, NOT_FOUND),
        (r#"[{"model":"llama"}]"#, None, NOT_FOUND),
        (r#""llama""#, None, NOT_FOUND),
    ];
    for (body, model, counted) in rows {
        assert_eq!(json(&rule(MissingModel::Pass), body), (Ok(model.map(str::to_owned)), counted), "{body}");
        let default = model.unwrap_or("base").to_owned();
        assert_eq!(json(&rule(MissingModel::Default("base".into())), body), (Ok(Some(default)), counted), "{body}");
        let (rejecting, count) = json(&rule(MissingModel::Reject), body);
        assert_eq!((rejecting.ok(), count), (model.map(|model| Some(model.to_owned())), counted), "{body}");
    }
}

#[test]
fn missing_model_error_says_what_was_found() {
    for (body, found) in
        [("{}", "none"), (r#"{"model":""}"#, "an empty one"), (r#"{"model":[]}"#, "a null, array or object")]
    {
        let expected = format!("the body names no model: found {found}, expected the name of a model");
        assert_eq!(json(&rule(MissingModel::Reject), body).0, Err(expected));
    }
}

#[test]
fn only_json_bodies_are_read() {
    let body = br#"{"model":"llama"}"#;
    let default = rule(MissingModel::Default("base".into()));
    for kind in ["application/json", "Application/JSON ; charset=utf-8", "application/problem+json", "a/b+JSON;c=d"] {
        assert_eq!(named(&default, Some(kind), body, 4), (Ok(Some("llama".into())), FOUND), "{kind}");
    }
    for kind in
        [None, Some("multipart/form-data; boundary=x"), Some("text/plain"), Some("application/jsonl"), Some("+json")]
    {
        for bbr in [&default, &rule(MissingModel::Reject)] {
            assert_eq!(named(bbr, kind, body, 4), (Ok(None), UNREAD), "{kind:?}");
            assert_eq!(named(bbr, kind, b"\xff{", 1), (Ok(None), UNREAD), "{kind:?}");
        }
    }
    let off = Bbr { enabled: false, ..rule(MissingModel::Reject) };
    assert_eq!(named(&off, Some("application/json"), b"no", 4), (Ok(None), UNREAD));
    assert_eq!(named(&rule(MissingModel::Reject), Some("application/json"), b"", 4), (Ok(None), UNREAD));
}

#[test]
fn missing_model_is_reported_before_the_end_of_the_body() {
    let metrics = Metrics::new(&[]);
    let mut naming = Naming::new(&rule(MissingModel::Reject), &headers(Some("application/json")), None, true, &metrics);
    assert!(naming.feed(br#"{"model":""#).is_ok());
    assert!(!naming.is_settled());
    assert_eq!(naming.feed(br#"","prompt":""#), Err(NamingError::Missing { found: "an empty one" }));
}

#[test]
fn model_headers_are_set_for_adapters_and_base_models() {
    let bbr = Bbr { base_models: [("sql".to_owned(), "llama".to_owned())].into(), ..Bbr::default() };
    let rows = [
        ("sql", Some("sql"), Some("llama")),
        ("llama", Some("llama"), Some("llama")),
        ("Sql", Some("Sql"), None),
        ("模型", Some("模型"), None),
        ("a\nb", None, None),
    ];
    for (model, name, base) in rows {
        let mut headers = HeaderMap::new();
        ModelHeaders::new(&bbr).set(&mut headers, model);
        let text = |name| headers.get(name).map(|value| std::str::from_utf8(value.as_bytes()).unwrap());
        assert_eq!((text(&bbr.header), text(&bbr.base_model_header)), (name, base), "{model:?}");
    }
}

/// The expected result, computed from the whole document.
fn reference(document: &Value, missing: &MissingModel) -> Result<Option<String>, ()> {
    let model = match document.get("model") {
        Some(Value::String(model)) if !model.is_empty() => Some(model.clone()),
        Some(scalar @ (Value::Number(_) | Value::Bool(_))) => Some(scalar.to_string()),
        _ => None,
    };
    match (model, missing) {
        (Some(model), _) => Ok(Some(model)),
        (None, MissingModel::Pass) => Ok(None),
        (None, MissingModel::Default(default)) => Ok(Some(default.clone())),
        (None, MissingModel::Reject) => Err(()),
    }
}

fn document() -> impl Strategy<Value = Value> {
    let model = prop_oneof![
        4 => "[a-z\\\\\"é😀]{0,4}".prop_map(Value::from),
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<f64>().prop_map(Value::from),
        1 => Just(json!([])),
        1 => Just(json!({"model": "inner"})),
    ];
    let around = ("[a-k]{1,3}", "(?s).{0,20}");
    (prop::option::of(model), prop::collection::vec(around, 0..4), any::<bool>()).prop_map(|(model, around, array)| {
        let mut document: Value = around.into_iter().map(|(key, value)| (key, Value::from(value))).collect();
        if let Some(model) = model {
            document["model"] = model;
        }
        if array { json!([document]) } else { document }
    })
}

#[test]
fn form_names_its_model_and_a_form_without_one_is_unread() {
    let kind = Some("multipart/form-data; boundary=b");
    let part =
        |name: &str, value: &str| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    let rule = rule(MissingModel::Reject);
    let whole = format!("{}{}--b--\r\n", part("file", "{\"model\":\"no\"}"), part("model", "whisper-1"));
    assert_eq!(named(&rule, kind, whole.as_bytes(), 5), (Ok(Some("whisper-1".to_owned())), FOUND));
    for none in [part("file", "x") + "--b--", part("model", "") + "--b--", "x".to_owned()] {
        assert_eq!(named(&rule, kind, none.as_bytes(), 5), (Ok(None), UNREAD), "{none}");
    }
    let twice = part("model", "a") + &part("model", "b") + "--b--";
    let (refused, _) = named(&rule, kind, twice.as_bytes(), 5);
    assert!(refused.unwrap_err().contains("a second field `model`"));
}

#[test]
fn query_names_the_model_of_a_request_without_a_body() {
    let metrics = Metrics::new(&[]);
    let model = |bbr: &Bbr, has_body| {
        let naming = Naming::new(bbr, &headers(None), Some("model=m"), has_body, &metrics);
        assert!(naming.is_settled());
        naming.model(bbr).map(str::to_owned)
    };
    assert_eq!(model(&Bbr::default(), false).as_deref(), Some("m"));
    assert_eq!(model(&Bbr::default(), true), None);
    assert_eq!(model(&Bbr { enabled: false, ..Bbr::default() }, false), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn model_matches_the_one_in_the_parsed_document(document in document(), piece in 1..20usize, rules in 0..3usize) {
        let missing = [MissingModel::Pass, MissingModel::Default("base".into()), MissingModel::Reject][rules].clone();
        let body = document.to_string();
        let (found, counted) = named(&rule(missing.clone()), Some("application/json"), body.as_bytes(), piece);
        prop_assert_eq!(counted.iter().sum::<u64>(), 1, "not counted once");
        prop_assert_eq!(found.map_err(drop), reference(&document, &missing), "{}", body);
    }
}

fn utf16(text: &str, order: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(order).collect()
}

fn utf32(text: &str, order: fn(u32) -> [u8; 4]) -> Vec<u8> {
    text.chars().flat_map(|character| order(character.into())).collect()
}

#[test]
fn byte_order_mark_is_skipped() {
    for text in [r#"{"model":"m"}"#, r#" {"model":"m"}"#, "1", "[]", "\"ä\""] {
        let (bare, marked) = (text.as_bytes().to_vec(), format!("\u{feff}{text}").into_bytes());
        for piece in [1, 2, 3, 4, 5, 100] {
            let read = |body: &[u8]| named(&Bbr::default(), Some("application/json"), body, piece);
            assert_eq!(read(&marked), read(&bare), "{text:?} by {piece}");
        }
    }
    let wrong = |body: &str| named(&Bbr::default(), Some("application/json"), body.as_bytes(), 2).0.unwrap_err();
    // Offsets count from the start of the body. Only one whole mark is skipped.
    assert!(wrong("\u{feff}{x").contains("byte 4: found `x`"), "{}", wrong("\u{feff}{x"));
    assert!(wrong("\u{feff}\u{feff}{}").contains("byte 3: found byte 0xef"));
    assert!(wrong("\u{feff}").contains("byte 3: found the end of the body"));
    let half = named(&Bbr::default(), Some("application/json"), b"\xef\xbb{}", 1).0.unwrap_err();
    assert!(half.contains("byte 0: found byte 0xef"), "{half}");
}

#[test]
fn utf16_and_utf32_name_no_model() {
    let default = rule(MissingModel::Default("d".into()));
    for text in [r#"{"model":"m"}"#, "\u{feff}{\"model\":\"m\"}", " 1", "\u{feff}", "[\"\u{1f600}\"]"] {
        let forms = [
            utf16(text, u16::to_le_bytes),
            utf16(text, u16::to_be_bytes),
            utf32(text, u32::to_le_bytes),
            utf32(text, u32::to_be_bytes),
        ];
        for body in forms {
            for piece in [1, 3, 100] {
                let read = |bbr: &Bbr| named(bbr, Some("application/json"), &body, piece);
                assert_eq!(read(&Bbr::default()), (Ok(None), NOT_FOUND), "{body:x?}");
                assert_eq!(read(&default), (Ok(Some("d".into())), NOT_FOUND), "{body:x?}");
                let refused = read(&rule(MissingModel::Reject)).0.unwrap_err();
                assert!(refused.contains("names no model"), "{refused}");
            }
        }
    }
}
