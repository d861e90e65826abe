//! What the head of a message says of its body's format.

use http::{HeaderMap, header};

use super::coding::Codings;

pub const EVENTS: &str = "text/event-stream";
pub const JSON: &str = "application/json";

/// The field Content-Type; empty if the message has none.
pub fn content_type(headers: &HeaderMap) -> &str {
    headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// The media type (RFC 9110 §8.3.1) as written, without parameters; empty if the message has no such field.
fn essence(headers: &HeaderMap) -> &str {
    content_type(headers).split(';').next().unwrap_or_default().trim()
}

/// The media type in lower case, without parameters; empty if the message names no type.
pub fn media_type(headers: &HeaderMap) -> String {
    essence(headers).to_ascii_lowercase()
}

/// Whether the body is an event stream.
pub fn is_events(headers: &HeaderMap) -> bool {
    essence(headers).eq_ignore_ascii_case(EVENTS)
}

/// Whether a body of this media type, in lower case, is a JSON document (RFC 6839 §3.1). Bodies that consist of several documents, or
/// of messages with a length before each, are not, though the names of their types end as JSON's do.
pub fn is_json(media_type: &str) -> bool {
    const FRAMED: [&str; 4] =
        ["application/grpc", "application/connect+", "application/stream+", "application/jsonlines+"];
    let is_based = media_type.len() > "+json".len() && media_type.ends_with("+json");
    media_type == JSON || is_based && !FRAMED.iter().any(|framed| media_type.starts_with(framed))
}

/// Whether a request names event streams among what it accepts (RFC 9110 §12.5.1).
pub fn accepts_events(headers: &HeaderMap) -> bool {
    let fields = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    fields
        .flat_map(|field| field.split(','))
        .any(|range| range.split(';').next().is_some_and(|range| range.trim().eq_ignore_ascii_case(EVENTS)))
}

/// Whether the body has a content coding.
pub fn is_coded(headers: &HeaderMap) -> bool {
    !Codings::of(headers).is_plain()
}
