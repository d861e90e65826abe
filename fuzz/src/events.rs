//! What the picker learns about a response body: the first event and the last ones of an event stream, a document, or every
//! byte; and the token counts in them. The result must not depend on how the body is cut.

use http::{HeaderMap, HeaderValue, header};
use penstock_agent::{
    config::ResponseToPicker,
    parts::{BodyFacts, Budget, Tee},
};
use penstock_common::{framing::Framing, tail};
use serde_json::Value;

use crate::input;

/// Longest first event that is told, in bytes.
const BEGIN: usize = 16 << 10;

pub fn run(data: &[u8]) {
    let (mut choices, payload) = input::split(data, 4);
    let flags = choices.byte();
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let document = flags & 1 == 1;
    let kind = if document { "application/json" } else { "text/event-stream" };
    let headers: HeaderMap = [(header::CONTENT_TYPE, HeaderValue::from_static(kind))].into_iter().collect();
    let tee = |mode| {
        let facts = BodyFacts { headers: &headers, length: None, streams: false };
        Tee::new(mode, &facts, &Budget::unlimited()).expect("this content type is supported")
    };

    let mut whole = tee(ResponseToPicker::Usage);
    whole.take(payload);
    let mut cut = tee(ResponseToPicker::Usage);
    input::pieces(payload, lengths).for_each(|piece| cut.take(piece));
    assert_eq!(cut.usage(), whole.usage(), "cut into {lengths:?}");

    // The same payload as chunks on the wire.
    let (mut framing, mut chunked) = (Framing::chunked(), tee(ResponseToPicker::Usage));
    for piece in input::pieces(payload, lengths) {
        let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
        chunked.take_framed(framing, &chunk);
        framing.feed(&chunk);
    }
    assert_eq!(chunked.usage(), whole.usage(), "in chunks of {lengths:?}");

    if document && payload.len() < tail::TAIL as usize {
        assert_eq!(whole.usage().is_some(), has_usage(payload), "the usage that serde_json finds");
    }
    let first = whole.next_piece();
    assert_eq!(first, cut.next_piece(), "the beginning, cut into {lengths:?}");
    let rest = whole.rest();
    assert_eq!(rest, cut.rest(), "the rest, cut into {lengths:?}");
    let unreadable = first.as_deref() == Some(b":\n\n");
    let (begin, end) = (first.map_or(0, |first| first.len()), rest.pieces.concat());
    assert!(begin <= BEGIN && (document || end.len() <= tail::TAIL as usize), "{} bytes were kept", end.len());
    if payload.len() < tail::TAIL as usize {
        // A beginning other than an event is told as a comment, and the body at the end.
        let told = if unreadable && end == payload { 0 } else { begin };
        assert!(end == payload[told..], "a short body is told whole");
    }

    let mut copy = tee(ResponseToPicker::Body);
    input::pieces(payload, lengths).for_each(|piece| copy.take(piece));
    assert!(copy.rest().pieces.concat() == payload, "the copy differs from the body");
}

fn has_usage(payload: &[u8]) -> bool {
    let Ok(Value::Object(message)) = serde_json::from_slice(payload) else { return false };
    let model = message.get("model").is_none_or(|model| model.is_string() || model.is_null());
    let counts = ["prompt_tokens", "input_tokens", "completion_tokens", "output_tokens"];
    let is_usage = |usage: &Value| {
        usage.is_object()
            && counts.iter().filter_map(|name| usage.get(name)).all(|count| count.is_u64() || count.is_null())
    };
    model && message.get("usage").is_some_and(is_usage)
}
