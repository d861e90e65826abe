//! What the picker learns about a response body: the token counts from the end of an event stream or from a document, or a bounded
//! copy of every byte. The result must not depend on how the body is cut.

use http::{HeaderMap, HeaderValue, header};
use penstock_agent::{config::ResponseToPicker, tee::Tee};
use penstock_common::{framing::Framing, tail};
use serde_json::Value;

use crate::input;

const QUEUE: usize = 1024;

pub fn run(data: &[u8]) {
    let (mut choices, payload) = input::split(data, 4);
    let flags = choices.byte();
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let kind = if flags & 1 == 0 { "text/event-stream" } else { "application/json" };
    let headers: HeaderMap = [(header::CONTENT_TYPE, HeaderValue::from_static(kind))].into_iter().collect();
    let tee = |mode| Tee::new(mode, &headers, None, QUEUE).expect("this content type is supported");

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

    let end: usize = whole.rest().iter().map(bytes::Bytes::len).sum();
    assert!(end <= payload.len() && (flags & 1 == 1 || end <= tail::TAIL as usize), "{end} bytes were kept");
    if payload.len() < tail::TAIL as usize {
        assert_eq!(whole.usage().is_some(), has_usage(payload, flags & 1 == 1), "the usage that serde_json finds");
    }

    let mut copy = tee(ResponseToPicker::Body);
    input::pieces(payload, lengths).for_each(|piece| copy.take(piece));
    let given_up = copy.given_up();
    assert_eq!(given_up, payload.len() > QUEUE, "the queue has a limit");
    let copied = copy.rest().concat();
    assert!(given_up || copied == payload, "the copy differs from the body");
}

fn has_usage(payload: &[u8], document: bool) -> bool {
    let is_usage = |text: &[u8]| {
        let Ok(Value::Object(message)) = serde_json::from_slice(text) else { return false };
        let count = |usage: &Value, names: [&str; 2]| {
            // Both spellings at once are invalid.
            let found: Vec<_> = names.iter().filter_map(|name| usage.get(name)).collect();
            found.len() < 2 && found.iter().all(|count| count.is_u64())
        };
        let model = message.get("model").is_none_or(|model| model.is_string() || model.is_null());
        let counts = |usage: &Value| {
            usage.is_object()
                && count(usage, ["prompt_tokens", "input_tokens"])
                && count(usage, ["completion_tokens", "output_tokens"])
        };
        model && message.get("usage").is_some_and(counts)
    };
    match document {
        true => is_usage(payload),
        false => {
            let lines = payload.split(|&byte| byte == b'\n' || byte == b'\r');
            lines.filter_map(|line| line.strip_prefix(b"data:")).any(is_usage)
        }
    }
}
