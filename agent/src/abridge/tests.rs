use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn abridged_in<'p>(limit: usize, pieces: impl IntoIterator<Item = &'p [u8]>) -> Result<Abridged, Whole> {
    let mut abridger = Abridger::new(limit);
    for piece in pieces {
        abridger.feed(piece)?;
        assert!(abridger.bytes() <= 2 * limit);
    }
    abridger.finish()
}

/// The abridged text; the same byte by byte.
fn abridged(limit: usize, body: &str) -> Result<String, Whole> {
    let whole = abridged_in(limit, [body.as_bytes()]);
    assert_eq!(abridged_in(limit, body.as_bytes().chunks(1)), whole, "byte by byte");
    whole.map(|abridged| String::from_utf8(abridged.body.to_vec()).expect("text"))
}

/// The text of string values, without quotes, and the document without it.
fn taken_apart(document: &str) -> (Vec<&str>, String) {
    let (mut strings, mut structure, mut rest) = (Vec::new(), String::new(), document);
    while let Some(quote) = rest.find('"') {
        let (before, string) = rest.split_at(quote + 1);
        let mut escaped = false;
        let end = string.bytes().position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        });
        let (text, after) = string.split_at(end.expect("a closing quote"));
        structure.push_str(before);
        if after[1..].trim_start().starts_with(':') {
            structure.push_str(text);
        } else {
            strings.push(text);
        }
        structure.push('"');
        rest = &after[1..];
    }
    (strings, structure + rest)
}

/// A limit with room for the structure of small documents.
const LIMIT: usize = 200;

#[test]
fn strings_end_early_once_the_limit_is_used_up() {
    let (long, model) = ("0123456789".repeat(60), "0123456789".repeat(10));
    let body = format!(
        r#"{{ "messages" : [{{"role":"user","content":"{long}"}}, "{long}", "{long}"],
            "model":"{model}", "stream": true, "temperature": 1.50, "stop":"", "x": null }} "#
    );
    let cut = abridged(800, &body).expect("abridged");
    let (strings, structure) = taken_apart(&cut);
    assert_eq!(structure, taken_apart(&body).1);
    // The first takes 536 bytes of the limit, the second the rest, and the model none.
    assert_eq!(strings, ["user", &long, &long[..ALWAYS + 264], &long[..ALWAYS], &model, ""]);
    assert_eq!(abridged(3 * (600 - ALWAYS), &body), Err(Whole::Short));
}

#[test]
fn string_is_cut_between_characters() {
    for (room, text, kept) in [
        (1, "yz", "y"),
        (1, "é", ""),
        (2, "€", ""),
        (3, "€", "€"),
        (3, "😀", ""),
        (1, r"\n", ""),
        (3, r"\n\n", r"\n"),
        (5, r"\u00e9", ""),
        (6, r"\u00e9", r"\u00e9"),
        (11, r"\ud83d\ude00", ""),
        (12, r"\ud83d\ude00", r"\ud83d\ude00"),
        // Lone surrogates.
        (6, r"\ud83d", r"\ud83d"),
        (11, r"\uD83D\uD83D", r"\uD83D"),
        (17, r"\ud83d\ud83d\ude00", r"\ud83d"),
        (7, r"\ude00y", r"\ude00y"),
        (7, r"\ud83dyz", r"\ud83dy"),
        (7, r"\ud83d\n", r"\ud83d"),
    ] {
        let begin = "x".repeat(LIMIT + ALWAYS - room);
        // Something has to be cut.
        let body = format!(r#"["{begin}{text}{}"]"#, "€".repeat(usize::from(text == kept)));
        assert_eq!(abridged(LIMIT, &body), Ok(format!(r#"["{begin}{kept}"]"#)), "{text} into {room} bytes");
    }
}

#[test]
fn model_is_found_where_it_is_in_the_original_body() {
    let long = "m".repeat(ALWAYS + 20);
    let content = "x".repeat(3 * LIMIT);
    for name in ["a", &long, r#"\u0061\"é"#] {
        let body = format!(r#"{{"prompt":"{content}", "model" : "{name}","messages":[{{"model":"inner"}}]}}"#);
        for cut in [1, 7, body.len()] {
            let abridged = abridged_in(2 * LIMIT, body.as_bytes().chunks(cut)).expect("abridged");
            let model = abridged.model.expect("a model");
            let at = model.at.start as usize..model.at.end as usize;
            assert_eq!(body[at], format!("\"{name}\""));
            assert_eq!(model.name, serde_json::from_str::<String>(&format!("\"{name}\"")).expect("a string"));
        }
    }
    let none = abridged_in(LIMIT, [format!(r#"{{"model":7,"x":"{content}"}}"#).as_bytes()]).expect("abridged");
    assert_eq!(none.model, None);
}

#[test]
fn bodies_that_cannot_be_abridged_are_sent_whole() {
    let long = "x".repeat(3 * LIMIT);
    let many = format!("[{}\"{long}\"]", "1,".repeat(LIMIT));
    let names = format!("{{\"{long}\":\"{long}\"}}");
    let cases = [
        (format!("[\"{long}\""), Whole::NotJson),
        (format!("\"{long}\"x"), Whole::NotJson),
        (long.clone(), Whole::NotJson),
        (format!("\"{long}\u{1}\""), Whole::NotJson),
        (format!("{{\"model\":\"a\",\"model\":\"b\",\"x\":\"{long}\"}}"), Whole::NotJson),
        (format!("{}\"{long}\"{}", "[".repeat(128), "]".repeat(128)), Whole::NotJson),
        (String::new(), Whole::NotJson),
        (many, Whole::Structure),
        (names, Whole::Structure),
        (format!("[{}\"x\"]", "\"x\",".repeat(LIMIT)), Whole::Structure),
        (r#"{"model":"a"}"#.to_owned(), Whole::Short),
    ];
    for (body, why) in cases {
        assert_eq!(abridged(LIMIT, &body), Err(why), "{body}");
    }
    assert_eq!(abridged_in(LIMIT, [&b"\"\xff\""[..]]), Err(Whole::NotJson));
}

#[test]
fn documents_are_compared_as_values() {
    let sent = r#"{"model":"m","n":1.50,"t":[true,null,{"b":"é<😀\n/","a":""}],"s":"\ud83d"}"#;
    let same = [
        r#"{"s":"\uD83D","t":[true,null,{"a":"","b":"\u00e9\u003c\ud83d\ude00\u000A\/"}],"n":1.50,"model":"\u006d"}"#,
        " { \"model\" : \"m\" ,\n\"n\" : 1.50, \"t\":[ true , null , { \"b\" : \"é<😀\\n/\", \"a\":\"\"} ], \"s\":\"\\ud83d\" }\n",
    ];
    for returned in same {
        assert_eq!(difference(sent, returned), Difference::None, "{returned}");
    }
    for (from, to, expected) in [
        (r#""model":"m""#, r#""model":"other""#, Difference::Model("other".to_owned())),
        (r#""model":"m""#, r#""model":"\u00e9""#, Difference::Model("é".to_owned())),
        (r#""model":"m""#, r#""model":["m"]"#, Difference::Other),
        (r#""model":"m""#, r#""model":"other","model":"other""#, Difference::Other),
        (r#""model":"m","#, "", Difference::Other),
        ("1.50", "1.5", Difference::Other),
        ("1.50", "\"1.50\"", Difference::Other),
        ("true", "false", Difference::Other),
        ("true,null", "null,true", Difference::Other),
        (r#""a":"""#, r#""a":"","a":"""#, Difference::Other),
        (r#""a":"""#, r#""A":"""#, Difference::Other),
        (r#""a":"""#, r#""a":"","c":0"#, Difference::Other),
        (r"\ud83d", r"\ufffd", Difference::Other),
        ("]", "", Difference::Other),
        ("}", "}}", Difference::Other),
    ] {
        let returned = sent.replacen(from, to, 1);
        assert_ne!(returned, sent);
        assert_eq!(difference(sent, &returned), expected, "{returned}");
    }
    assert_eq!(difference(r#"{"a":1}"#, r#"{"a":1,"model":"m"}"#), Difference::Other);
    assert_eq!(difference(r#""a""#, r#""\u0061""#), Difference::None);
    let deep = |count: usize| format!("{}{}", "[".repeat(count), "]".repeat(count));
    assert_eq!(difference("[]", &deep(1_000_000)), Difference::Other);
    assert_eq!(difference(&deep(127), &format!(" {}", deep(127))), Difference::None);
}

#[test]
fn rewriter_is_remembered_for_a_time() {
    let (rewriter, begin) = (Rewriter::default(), Instant::now());
    assert!(!rewriter.is_known(begin));
    rewriter.found(begin);
    assert!(rewriter.is_known(begin + Duration::from_secs(59)));
    assert!(!rewriter.is_known(begin + Duration::from_secs(60)));
}

fn difference(sent: &str, returned: &str) -> Difference {
    super::difference(sent.as_bytes(), returned.as_bytes())
}

/// JSON with strings of all lengths and kinds of characters.
fn value() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        prop::sample::select(vec!["", "user", "model", "a\"b\\", "\u{1}\n", "é😀"]).prop_map(str::to_owned),
        prop::collection::vec(prop::sample::select(vec!['x', ' ', '"', '\\', '\n', '\u{7f}', 'é', '€', '😀']), 0..300)
            .prop_map(String::from_iter),
    ];
    let leaf = prop_oneof![
        4 => text.clone().prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => (-1e9..1e9).prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((text.clone(), inner), 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// The document with every character beyond ASCII escaped.
fn ascii(document: &str) -> String {
    let escaped = |character: char| {
        let units = character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
        if character.is_ascii() { character.to_string() } else { units }
    };
    document.chars().map(escaped).collect()
}

/// Whether `abridged` has the structure of `whole`, and its strings begin those of `whole`.
fn is_abridged(abridged: &Value, whole: &Value) -> bool {
    match (abridged, whole) {
        (Value::String(begin), Value::String(all)) => all.starts_with(begin.as_str()),
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| is_abridged(ours, theirs))
        }
        (Value::Object(ours), Value::Object(theirs)) => {
            let is_abridged = |((key, ours), (other, theirs)): ((&String, &Value), (&String, &Value))| {
                key == other && is_abridged(ours, theirs)
            };
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(is_abridged)
        }
        _ => abridged == whole,
    }
}

fn is_no_model(name: &str) -> bool {
    name.len() > crate::bbr::MAX_MODEL || name.contains(|c: char| c.is_ascii_control() && c != '\t')
}

proptest! {
    #[test]
    fn abridged_body_is_json_with_the_same_structure(
        value in value(),
        form in 0..3,
        limit in 0_usize..1500,
        cut in 1_usize..100,
    ) {
        let text = if form == 0 { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
        let text = text.expect("JSON");
        let text = if form == 1 { ascii(&text) } else { text };
        let result = abridged_in(limit, [text.as_bytes()]);
        // Of two reasons, the cut decides which is found first.
        prop_assert_eq!(abridged_in(limit, text.as_bytes().chunks(cut)).ok(), result.clone().ok());
        let (strings, structure) = taken_apart(&text);
        let always: usize = strings.iter().map(|string| string.len().min(ALWAYS)).sum();
        let rest: usize = strings.iter().map(|string| string.len().saturating_sub(ALWAYS)).sum();
        match result {
            Ok(Abridged { body, .. }) => {
                let abridged = std::str::from_utf8(&body).expect("text");
                let parsed = |text| serde_json::from_str::<Value>(text).expect("JSON");
                prop_assert!(is_abridged(&parsed(abridged), &parsed(&text)));
                let (kept, same) = taken_apart(abridged);
                prop_assert_eq!(same, structure.clone());
                prop_assert!(strings.iter().zip(&kept).all(|(whole, kept)| whole.starts_with(kept)));
                prop_assert!(strings.iter().zip(&kept).all(|(whole, kept)| whole == kept || kept.len() + 12 > ALWAYS));
                prop_assert!(body.len() <= limit + structure.len() + always + crate::bbr::MAX_MODEL);
                prop_assert!(rest > limit);
                // As much of the beginning is kept as the limit allows.
                let same = text.bytes().zip(abridged.bytes()).take_while(|(whole, kept)| whole == kept).count();
                prop_assert!(same + 12 > limit.min(abridged.len()));
            }
            Err(Whole::Short) => prop_assert!(rest <= limit + crate::bbr::MAX_MODEL),
            Err(Whole::Structure) => prop_assert!(structure.len() + always + crate::bbr::MAX_MODEL > limit),
            // A name may be too long for a model, or have control characters.
            Err(Whole::NotJson) => prop_assert!(value["model"].as_str().is_some_and(is_no_model)),
        }
    }

    #[test]
    fn reserialised_document_has_no_difference(value in value(), other in value()) {
        let text = serde_json::to_string(&value).expect("JSON");
        prop_assert_eq!(difference(&text, &ascii(&serde_json::to_string_pretty(&value).expect("JSON"))), Difference::None);
        let other_text = serde_json::to_string(&other).expect("JSON");
        prop_assert_eq!(difference(&text, &other_text) == Difference::None, text == other_text);
    }
}
