//! What the head of a message says of its body's format.

use http::{HeaderMap, HeaderValue, header};

use super::coding::Codings;

pub const EVENTS: &str = "text/event-stream";
pub const JSON: &str = "application/json";

/// The field Content-Type; empty if the message has none. Its parameters may have any bytes.
pub fn content_type(headers: &HeaderMap) -> &[u8] {
    headers.get(header::CONTENT_TYPE).map_or(b"", HeaderValue::as_bytes)
}

/// The media type (RFC 9110 §8.3.1) as written, without parameters; empty if the message has no such field.
fn essence(headers: &HeaderMap) -> &str {
    std::str::from_utf8(without_parameters(content_type(headers))).unwrap_or_default()
}

/// What is before the first `;`.
pub fn without_parameters(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii()
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
    let fields = headers.get_all(header::ACCEPT).iter().map(HeaderValue::as_bytes);
    fields
        .flat_map(|field| field.split(|byte| *byte == b','))
        .any(|range| without_parameters(range).eq_ignore_ascii_case(EVENTS.as_bytes()))
}

/// Whether the body has a content coding.
pub fn is_coded(headers: &HeaderMap) -> bool {
    !Codings::of(headers).is_plain()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of a parameter do not hide the type.
    #[test]
    fn type_is_known_whatever_bytes_its_parameters_have() {
        for parameter in [&b""[..], b"; charset=utf-8", b"; x=\xe9", b" ; x=\"\xc3\xa9\"", b";x=\xff\xfe"] {
            let headers = |name, kind: &str| {
                let value = HeaderValue::from_bytes(&[kind.as_bytes(), parameter].concat()).unwrap();
                HeaderMap::from_iter([(name, value)])
            };
            assert_eq!(media_type(&headers(header::CONTENT_TYPE, "Application/JSON")), JSON, "{parameter:?}");
            assert!(is_events(&headers(header::CONTENT_TYPE, "Text/Event-Stream")), "{parameter:?}");
            assert!(accepts_events(&headers(header::ACCEPT, "a/b, Text/Event-Stream")), "{parameter:?}");
            assert!(!accepts_events(&headers(header::ACCEPT, "a/b, text/event-stream2")), "{parameter:?}");
        }
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_bytes(b"text/\xe9; a=b").unwrap())]);
        assert_eq!((media_type(&headers), content_type(&headers)), (String::new(), &b"text/\xe9; a=b"[..]));
    }
}
