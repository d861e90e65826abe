//! Tests what a picker gets of a response body.

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;

use super::*;

fn tee(mode: ResponseToPicker, kind: &'static str) -> Option<Tee> {
    let headers: HeaderMap = [(header::CONTENT_TYPE, HeaderValue::from_static(kind))].into_iter().collect();
    Tee::new(mode, &headers, None, 100_000)
}

fn joined(pieces: &[Bytes]) -> Vec<u8> {
    pieces.concat()
}

/// `events` numbered events, then usage and the end, as a model server sends them with `stream_options.include_usage`.
fn stream(events: usize, end: &str) -> String {
    let body: String = (0..events).map(|n| format!("data: {{\"model\":\"m\",\"n\":{n}}}{end}{end}")).collect();
    let usage = r#"{"model":"m","usage":{"prompt_tokens":7,"completion_tokens":9}}"#;
    format!("{body}data: {usage}{end}{end}data: [DONE]{end}{end}")
}

const USAGE: (u64, u64) = (7, 9);

fn tokens(tee: &Tee) -> Option<(u64, u64)> {
    tee.usage().map(|usage| (usage.input_tokens, usage.output_tokens))
}

#[test]
fn only_parsable_bodies_are_kept() {
    use ResponseToPicker::{Body, Headers, Usage};
    let rows = [
        (Headers, "text/event-stream", None),
        (Usage, "text/event-stream", Some(false)),
        (Usage, "Text/Event-Stream; charset=utf-8", Some(false)),
        (Usage, "application/json", Some(true)),
        (Usage, "audio/mpeg", None),
        (Body, "text/event-stream", Some(true)),
        (Body, "audio/mpeg", Some(true)),
    ];
    for (mode, kind, wants_all) in rows {
        assert_eq!(tee(mode, kind).map(|tee| tee.wants_all()), wants_all, "{mode:?} {kind}");
    }
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let with_length = |length| Tee::new(Usage, &headers, Some(length), 1).is_some();
    assert!(with_length(DOCUMENT as u64) && !with_length(DOCUMENT as u64 + 1));
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    assert!(Tee::new(Usage, &headers, None, 1).is_none());
}

#[test]
fn long_stream_is_sent_from_the_first_whole_event_of_its_tail() {
    for end in ["\n", "\r\n", "\r"] {
        let text = stream(500, end);
        let mut tee = tee(ResponseToPicker::Usage, "text/event-stream").unwrap();
        for piece in text.as_bytes().chunks(777) {
            tee.take(piece);
        }
        assert_eq!(tokens(&tee), Some(USAGE), "{end:?}");
        let told = String::from_utf8(joined(&tee.rest())).unwrap();
        assert!(text.ends_with(&told) && told.starts_with("data: "), "{told}");
        // No complete event that would have fitted is left out.
        let left = &text[..text.len() - told.len()];
        let event = left.len() - left.trim_end().rfind("data: ").unwrap();
        assert!(told.len() + event + 4 > tail::TAIL as usize, "{} {event}", told.len());
    }
}

#[test]
fn short_stream_is_sent_whole() {
    let text = stream(3, "\n");
    let mut tee = tee(ResponseToPicker::Usage, "text/event-stream").unwrap();
    tee.take(text.as_bytes());
    assert!(joined(&tee.rest()) == text.as_bytes());
}

#[test]
fn event_longer_than_the_tail_is_not_sent_in_part() {
    let mut tee = tee(ResponseToPicker::Usage, "text/event-stream").unwrap();
    tee.take(format!("data: {}", "x".repeat(5000)).as_bytes());
    assert_eq!((tee.usage(), tee.rest()), (None, vec![]));
}

#[test]
fn bytes_before_a_gap_are_dropped() {
    let mut tee = tee(ResponseToPicker::Usage, "text/event-stream").unwrap();
    tee.take(b"data: early\n\n");
    tee.skipped();
    tee.take(b"rest of an event\n\ndata: [DONE]\n\n");
    assert_eq!(joined(&tee.rest()), b"data: [DONE]\n\n");
}

#[test]
fn document_is_sent_whole_or_not_at_all() {
    let document =
        |len| format!(r#"{{"usage":{{"prompt_tokens":7,"completion_tokens":9}},"text":"{}"}}"#, "x".repeat(len));
    for (len, whole) in [(10, true), (200_000, true), (DOCUMENT, false), (3 * DOCUMENT, false)] {
        let text = document(len);
        let mut tee = tee(ResponseToPicker::Usage, "application/json").unwrap();
        for piece in text.as_bytes().chunks(10_000) {
            tee.take(piece);
        }
        assert_eq!(tokens(&tee), whole.then_some(USAGE));
        assert!(joined(&tee.rest()) == if whole { text.into_bytes() } else { Vec::new() });
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
        (r#"{"model":"m"}"#, None),
        ("[DONE]", None),
    ];
    for (text, usage) in rows {
        assert_eq!(usage::of_document(text.as_bytes()), usage, "{text}");
        assert_eq!(usage::of_events(format!("data: {text}\n\ndata:[DONE]\n\n").as_bytes()), usage, "{text}");
    }
}

#[test]
fn picker_that_takes_no_pieces_gets_no_more() {
    let mut tee = tee(ResponseToPicker::Body, "audio/mpeg").unwrap();
    for _ in 0..10 {
        tee.take(&[1; 10_000]);
    }
    assert!(!tee.given_up());
    assert_eq!(tee.next_piece().map(|piece| piece.len()), Some(10_000));
    tee.take(&[1; 10_000]);
    assert!(!tee.given_up());
    tee.take(&[1; 1]);
    assert!(tee.given_up());
    tee.take(&[1; 1]);
    assert_eq!((tee.next_piece(), tee.rest()), (None, vec![]));
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
        let mut tee = tee(ResponseToPicker::Body, "audio/mpeg").unwrap();
        let mut framing = Framing::chunked();
        for piece in wire.chunks(cut) {
            tee.take_framed(framing, piece);
            prop_assert_eq!(framing.feed(piece), piece.len());
        }
        prop_assert!(framing.is_done());
        prop_assert_eq!(joined(&tee.rest()), payload);
    }
}
