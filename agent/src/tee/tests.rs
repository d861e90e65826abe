//! Tests what a picker gets of a response body.

use ResponseToPicker::{Body as Whole, Headers, Off, Usage as Tokens};
use http::{HeaderMap, HeaderValue, header};
use penstock_common::tail::TAIL;
use proptest::prelude::*;

use super::*;

fn headers(kind: &'static str) -> HeaderMap {
    [(header::CONTENT_TYPE, HeaderValue::from_static(kind))].into_iter().collect()
}

fn tee(mode: ResponseToPicker, kind: &'static str) -> Option<Tee> {
    Tee::new(mode, &BodyFacts { headers: &headers(kind), length: None, streams: false }, &Budget::unlimited())
}

/// What the picker is told of a body that arrives in pieces: the pieces before its end, and those at its end.
fn told(tee: &mut Tee, text: &[u8], piece: usize) -> (Vec<Bytes>, Rest) {
    let mut before = Vec::new();
    for piece in text.chunks(piece) {
        tee.take(piece);
        before.extend(std::iter::from_fn(|| tee.next_piece()));
    }
    (before, tee.rest())
}

/// `events` numbered events, then usage and the end, as a model server sends them with `stream_options.include_usage`.
fn stream(events: usize, end: &str) -> String {
    let body: String = (0..events).map(|n| format!("data: {{\"model\":\"m\",\"n\":{n}}}{end}{end}")).collect();
    let usage = r#"{"model":"m","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}"#;
    format!("{body}data: {usage}{end}{end}data: [DONE]{end}{end}")
}

const USAGE: (u64, u64) = (7, 9);

fn tokens(tee: &Tee) -> Option<(u64, u64)> {
    tee.usage().map(|usage| (usage.input_tokens, usage.output_tokens))
}

/// Whether the beginning, the end and every byte are wanted.
fn wants(tee: &Tee) -> (bool, bool, bool) {
    (tee.wants_begin(), tee.wants_end(), tee.wants_all())
}

#[test]
fn mode_and_kind_of_body_say_what_is_wanted() {
    let events = "text/event-stream";
    let rows = [
        (Off, events, None),
        (Off, "application/json", None),
        (Headers, events, Some((true, false, false))),
        (Headers, "application/json", None),
        (Headers, "audio/mpeg", None),
        (Tokens, events, Some((true, true, false))),
        (Tokens, "Text/Event-Stream; charset=utf-8", Some((true, true, false))),
        (Tokens, "application/json", Some((false, false, true))),
        (Tokens, "audio/mpeg", None),
        (Tokens, "application/grpc", None),
        (Whole, events, Some((true, true, true))),
        (Whole, "audio/mpeg", Some((false, false, true))),
    ];
    for (mode, kind, expected) in rows {
        assert_eq!(tee(mode, kind).as_ref().map(wants), expected, "{mode:?} {kind}");
    }
    let asked = |kind| {
        let facts = BodyFacts { headers: &headers(kind), length: None, streams: true };
        Tee::new(Tokens, &facts, &Budget::unlimited()).as_ref().map(wants)
    };
    assert_eq!(asked("text/plain"), Some((true, true, false)), "the request asked for a stream");
    assert_eq!(asked("audio/mpeg"), Some((true, false, false)));
    assert_eq!(asked("application/json"), Some((false, false, true)), "such as an error");
    assert_eq!(asked("application/grpc"), None);
}

#[test]
fn coded_and_long_bodies_are_not_kept() {
    let new = |kind, coding: &'static str, length| {
        let mut headers = headers(kind);
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding));
        Tee::new(Tokens, &BodyFacts { headers: &headers, length, streams: false }, &Budget::unlimited())
    };
    let document = |length: usize| new("application/json", "identity", Some(length as u64)).is_some();
    assert!(document(DOCUMENT) && !document(DOCUMENT + 1));
    assert!(new("application/json", "gzip", None).is_none());
    let mut tee = new("text/event-stream", "gzip", None).expect("its beginning is told");
    assert_eq!(wants(&tee), (true, false, false));
    let (before, rest) = told(&mut tee, b"\x1f\x8b\x08\n\ndata: 1\n\n", 3);
    assert_eq!((before, rest, tee.usage()), (vec![Bytes::from_static(b":\n\n")], Rest::default(), None));
}

#[test]
fn first_event_is_told_at_once_and_last_ones_at_the_end() {
    for (mode, end) in [(Tokens, "\n"), (Tokens, "\r\n"), (Tokens, "\r"), (Headers, "\n")] {
        let text = stream(500, end);
        let first = text.find(&format!("{end}{end}")).unwrap() + 2 * end.len();
        for piece in [1, 777, text.len()] {
            let mut tee = tee(mode, "text/event-stream").unwrap();
            let (before, rest) = told(&mut tee, text.as_bytes(), piece);
            assert_eq!(before, [&text.as_bytes()[..first]], "{mode:?} {end:?} {piece}");
            assert!(!tee.wants_begin());
            if mode == Headers {
                assert_eq!((tee.usage(), rest), (None, Rest::default()));
                continue;
            }
            assert_eq!(tokens(&tee), Some(USAGE), "{end:?}");
            let last = std::str::from_utf8(&rest.pieces[0]).unwrap();
            assert!(rest.pieces.len() == 1 && text.ends_with(last) && last.starts_with("data: "), "{last}");
            // No complete event that would have fitted is left out.
            let left = &text[..text.len() - last.len()];
            let event = left.len() - left.trim_end().rfind("data: ").unwrap();
            assert!(last.len() + event + 4 > TAIL as usize, "{} {event}", last.len());
        }
    }
}

#[test]
fn stream_shorter_than_tail_is_told_whole_and_once() {
    let text = stream(3, "\n");
    for piece in 1..text.len() {
        let mut tee = tee(Tokens, "text/event-stream").unwrap();
        let (before, rest) = told(&mut tee, text.as_bytes(), piece);
        assert_eq!([before, rest.pieces].concat().concat(), text.as_bytes());
        assert_eq!(tokens(&tee), Some(USAGE));
    }
    // A picker that takes nothing before the end gets the same messages.
    let mut tee = tee(Tokens, "text/event-stream").unwrap();
    tee.take(text.as_bytes());
    let rest = tee.rest().pieces;
    assert_eq!((rest.len(), rest.concat()), (2, text.into_bytes()));
}

#[test]
fn counts_of_first_and_last_events_are_merged() {
    let usage = |text: &str| {
        let mut tee = tee(Tokens, "text/event-stream").unwrap();
        tee.take(text.as_bytes());
        tee.usage().map(|usage| (usage.model, usage.input_tokens, usage.output_tokens))
    };
    let filler = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\"}\n\n".repeat(100);
    let start = r#"{"type":"message_start","message":{"model":"m","usage":{"input_tokens":5,"output_tokens":1}}}"#;
    let delta = r#"{"type":"message_delta","usage":{"output_tokens":8}}"#;
    let messages = format!("data: {start}\n\n{filler}data: {delta}\n\nevent: message_stop\ndata: {{}}\n\n");
    assert_eq!(usage(&messages), Some(("m".to_owned(), 5, 8)));
    let created = r#"{"type":"response.created","response":{"model":"r","usage":null}}"#;
    let completed = format!(
        r#"{{"type":"response.completed","response":{{"model":"r","text":"{}","usage":{{"input_tokens":3,"output_tokens":4}}}}}}"#,
        "x".repeat(5000)
    );
    let responses = format!("data: {created}\n\n{filler}data: {completed}\n\n");
    assert_eq!(usage(&responses), Some(("r".to_owned(), 3, 4)));
    // A usage in each event: the last one counts.
    let continuous: String = (0..300)
        .map(|n| format!("data: {{\"usage\":{{\"prompt_tokens\":2,\"completion_tokens\":{n}}}}}\n\n"))
        .collect();
    assert_eq!(usage(&continuous), Some((String::new(), 2, 299)));
    assert_eq!(usage(&filler), None);
}

#[test]
fn bytes_before_a_gap_are_dropped() {
    let mut tee = tee(Tokens, "text/event-stream").unwrap();
    tee.take(b"data: early\n\n");
    assert_eq!(tee.next_piece().as_deref(), Some(b"data: early\n\n".as_slice()));
    tee.skipped();
    tee.take(b"rest of an event\n\ndata: [DONE]\n\n");
    assert_eq!(tee.rest().pieces.concat(), b"data: [DONE]\n\n");
}

#[test]
fn document_is_told_whole_or_not_at_all() {
    let document =
        |len| format!(r#"{{"usage":{{"prompt_tokens":7,"completion_tokens":9}},"text":"{}"}}"#, "x".repeat(len));
    for (len, whole) in [(10, true), (200_000, true), (DOCUMENT, false), (3 * DOCUMENT, false)] {
        let text = document(len);
        let mut tee = tee(Tokens, "application/json").unwrap();
        for piece in text.as_bytes().chunks(10_000) {
            tee.take(piece);
            assert_eq!(tee.next_piece(), None);
        }
        assert_eq!(tokens(&tee), whole.then_some(USAGE));
        assert!(tee.rest().pieces.concat() == if whole { text.into_bytes() } else { Vec::new() });
    }
}

#[test]
fn usage_is_read_from_documents_and_events() {
    let usage =
        |model: &str, input_tokens, output_tokens| Some(Usage { model: model.to_owned(), input_tokens, output_tokens });
    let rows = [
        (r#"{"model":"m","usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#, usage("m", 1, 2)),
        (r#"{"usage":{"input_tokens":1,"output_tokens":2}}"#, usage("", 1, 2)),
        (r#"{"model":"e","usage":{"prompt_tokens":5,"total_tokens":5}}"#, usage("e", 5, 0)),
        (r#"{"model":"m","usage":null}"#, None),
        (r#"{"model":"m","message":"no object"}"#, None),
        (r#"{"model":"m"}"#, None),
        ("[DONE]", None),
    ];
    for (text, usage) in rows {
        assert_eq!(usage::of_document(text.as_bytes()).usage(), usage, "{text}");
        assert_eq!(usage::of_events(format!("data: {text}\n\ndata:[DONE]\n\n").as_bytes()).usage(), usage, "{text}");
    }
}

proptest! {
    #[test]
    fn chunk_syntax_is_left_out_in_any_cuts(chunks in prop::collection::vec(1usize..3000, 1..20), cut in 1usize..500) {
        let mut wire = Vec::new();
        let mut payload = Vec::new();
        for (n, len) in chunks.into_iter().enumerate() {
            let chunk = vec![n as u8; len];
            wire.extend_from_slice(format!("{len:x};n=v\r\n").as_bytes());
            wire.extend_from_slice(&chunk);
            wire.extend_from_slice(b"\r\n");
            payload.extend_from_slice(&chunk);
        }
        wire.extend_from_slice(b"0\r\nx-trailer: 1\r\n\r\n");
        let mut tee = tee(Whole, "audio/mpeg").unwrap();
        let mut framing = Framing::chunked();
        for piece in wire.chunks(cut) {
            tee.take_framed(framing, piece);
            prop_assert_eq!(framing.feed(piece), piece.len());
        }
        prop_assert!(framing.is_done());
        prop_assert_eq!(tee.rest().pieces.concat(), payload);
    }
}

#[test]
fn array_in_place_of_an_object_is_no_usage() {
    for text in [r#"{"usage":[1,2,3,4]}"#, r#"{"usage":[]}"#, r#"["m",{"prompt_tokens":1}]"#] {
        let mut tee = tee(Tokens, "application/json").expect("a document is kept");
        tee.take(text.as_bytes());
        assert_eq!(tee.usage(), None, "{text}");
    }
}

#[test]
fn documents_share_a_memory_budget() {
    let memory = Budget::new(1000, Default::default());
    let headers = headers("application/json");
    let new = || {
        let facts = BodyFacts { headers: &headers, length: None, streams: false };
        Tee::new(Tokens, &facts, &memory).expect("a document is kept")
    };
    let (mut one, mut two) = (new(), new());
    one.take(&[b' '; 600]);
    two.take(&[b' '; 400]);
    two.take(b" ");
    assert!(two.given_up() && !one.given_up());
    assert_eq!(two.rest(), Rest::default());
    // The bytes of the second one were given back.
    one.take(&[b' '; 400]);
    let told = one.rest();
    assert_eq!(told.pieces.concat().len(), 1000);
    let mut three = new();
    three.take(b" ");
    assert!(three.given_up(), "what is being told still counts");
    drop(told);
    let mut four = new();
    four.take(b" ");
    assert!(!four.given_up());
}
