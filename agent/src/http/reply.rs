//! A complete answer that does not come from an endpoint: the agent's own error or the picker's reply.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header};

use super::{date, fields};
use crate::text::cut;

/// The field with a gRPC client's status.
pub const GRPC_STATUS: &str = "grpc-status";
const GRPC_MESSAGE: &str = "grpc-message";
/// The last status that gRPC defines.
const LAST_STATUS: u8 = 16;
/// Longest message for a gRPC client in bytes, before it is encoded, which makes it three times as long at most: clients refuse answers
/// with more than 8 KiB of fields.
const LONGEST: usize = 1024;

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: StatusCode,
    /// Framing and connection headers in it are ignored.
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    /// Appends the answer as HTTP/1.1, without a body if there must be none (RFC 9112 §6.3). An HTTP/1.0 client is told that its
    /// connection stays open, because otherwise it waits for the close.
    pub fn write(&self, out: &mut BytesMut, method: &Method, keep_alive: bool, client: Version) {
        let reason = self.status.canonical_reason().unwrap_or_default();
        out.put_slice(format!("HTTP/1.1 {} {reason}\r\n", self.status.as_u16()).as_bytes());
        for (name, value) in self.fields() {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        if !self.headers.contains_key(header::DATE) {
            out.put_slice(b"date: ");
            out.put_slice(date::now().as_bytes());
            out.put_slice(b"\r\n");
        }
        if !self.is_bodiless() {
            out.put_slice(format!("content-length: {}\r\n", self.body.len()).as_bytes());
        }
        match keep_alive {
            false => out.put_slice(b"connection: close\r\n"),
            true if client == Version::HTTP_10 => out.put_slice(b"connection: keep-alive\r\n"),
            true => {}
        }
        out.put_slice(b"\r\n");
        if !self.is_bodiless() && method != Method::HEAD {
            out.put_slice(&self.body);
        }
    }

    /// Converts the answer for a gRPC client, which reads the status from head fields without a body ("Trailers-Only").
    /// Statuses map as in gRPC's http-grpc-status-mapping. A status and a message that the answer already has in its fields are kept, if
    /// they are valid.
    #[must_use]
    pub fn grpc(self, message: &str) -> Self {
        let code = match self.status.as_u16() {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502..=504 => 14,
            _ => 2,
        };
        let mut headers = self.headers;
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        let own = headers.get(GRPC_STATUS).filter(|own| is_grpc_status(own.as_bytes())).cloned();
        headers.insert(GRPC_STATUS, own.unwrap_or_else(|| HeaderValue::from(code)));
        let own = headers.get(GRPC_MESSAGE).filter(|own| is_grpc_message(own.as_bytes())).cloned();
        if let Some(message) = own.or_else(|| HeaderValue::from_str(&percent_encoded(&cut(message, LONGEST))).ok()) {
            headers.insert(GRPC_MESSAGE, message);
        }
        Self { status: StatusCode::OK, headers, body: Bytes::new() }
    }

    /// The answer as HTTP/2 head and body.
    pub fn frames(&self, method: &Method) -> (Response<()>, Bytes) {
        let mut head = Response::new(());
        *head.status_mut() = self.status;
        head.headers_mut().extend(self.fields().map(|(name, value)| (name.clone(), value.clone())));
        if !self.is_bodiless() {
            head.headers_mut().insert(header::CONTENT_LENGTH, self.body.len().into());
        }
        let bodiless = self.is_bodiless() || method == Method::HEAD;
        (head, if bodiless { Bytes::new() } else { self.body.clone() })
    }

    fn fields(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        let own = |name: &HeaderName| name == header::CONTENT_LENGTH || fields::is_hop_by_hop(name);
        self.headers.iter().filter(move |(name, _)| !own(name))
    }

    fn is_bodiless(&self) -> bool {
        self.status == StatusCode::NO_CONTENT || self.status == StatusCode::NOT_MODIFIED
    }
}

/// Whether this is a status in decimal digits, without zeros before it.
fn is_grpc_status(value: &[u8]) -> bool {
    let number: Option<u8> = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    number.is_some_and(|number| number <= LAST_STATUS && number.to_string().as_bytes() == value)
}

/// Whether this is an encoded message that is not too long.
fn is_grpc_message(value: &[u8]) -> bool {
    value.len() <= 3 * LONGEST && value.iter().all(|byte| matches!(byte, b' '..=b'~'))
}

/// gRPC's encoding of a status message: printable ASCII except `%` is literal.
fn percent_encoded(message: &str) -> String {
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Whether the content type is that of gRPC (gRPC over HTTP2, "Content-Type").
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    kind.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_without_allowed_body_has_none() {
        let rows = [
            (Method::GET, StatusCode::OK, "date: now\r\ncontent-length: 2\r\n\r\nhi"),
            (Method::HEAD, StatusCode::OK, "date: now\r\ncontent-length: 2\r\n\r\n"),
            (Method::GET, StatusCode::NO_CONTENT, "date: now\r\n\r\n"),
            (Method::GET, StatusCode::NOT_MODIFIED, "date: now\r\n\r\n"),
        ];
        for (method, status, end) in rows {
            let mut out = BytesMut::new();
            let headers = HeaderMap::from_iter([(header::DATE, HeaderValue::from_static("now"))]);
            let reply = Reply { status, headers, body: Bytes::from_static(b"hi") };
            reply.write(&mut out, &method, true, Version::HTTP_11);
            assert!(out.ends_with(end.as_bytes()), "{method} {status}: {:?}", String::from_utf8_lossy(&out));
        }
    }

    #[test]
    fn answer_says_what_becomes_of_the_connection() {
        let rows = [
            (Version::HTTP_10, true, "\r\nconnection: keep-alive\r\n\r\n"),
            (Version::HTTP_10, false, "\r\nconnection: close\r\n\r\n"),
            (Version::HTTP_11, true, "\r\ncontent-length: 0\r\n\r\n"),
            (Version::HTTP_11, false, "\r\nconnection: close\r\n\r\n"),
        ];
        for (client, keep_alive, end) in rows {
            let mut out = BytesMut::new();
            let headers = HeaderMap::from_iter([(header::CONNECTION, HeaderValue::from_static("x-ignored"))]);
            let reply = Reply { status: StatusCode::OK, headers, body: Bytes::new() };
            reply.write(&mut out, &Method::GET, keep_alive, client);
            let text = String::from_utf8_lossy(&out);
            assert!(text.ends_with(end) && !text.contains("x-ignored"), "{client:?} {keep_alive}: {text}");
        }
    }

    #[test]
    fn answer_without_date_gets_a_date() {
        let mut out = BytesMut::new();
        let reply = Reply { status: StatusCode::NOT_FOUND, headers: HeaderMap::new(), body: Bytes::new() };
        reply.write(&mut out, &Method::GET, true, Version::HTTP_11);
        let text = String::from_utf8(out.to_vec()).unwrap();
        assert!(text.starts_with("HTTP/1.1 404 Not Found\r\ndate: ") && text.contains(" GMT\r\n"), "{text}");
    }

    #[test]
    fn grpc_answer_has_the_status_in_its_head() {
        let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_static("1"))]);
        let reply = Reply { status: StatusCode::SERVICE_UNAVAILABLE, headers, body: Bytes::from_static(b"{}") };
        let reply = reply.grpc("100 % gone\n");
        assert_eq!((reply.status, reply.body.len()), (StatusCode::OK, 0));
        assert_eq!(reply.headers["grpc-status"], "14");
        assert_eq!(reply.headers["grpc-message"], "100 %25 gone%0A");
        assert_eq!(reply.headers["retry-after"], "1");
    }

    #[test]
    fn grpc_status_and_message_of_the_answer_itself_are_kept_if_valid() {
        let long = "x".repeat(3 * LONGEST + 1);
        for (status, message, expected) in [
            ("12", "nope", ("12", "nope")),
            ("0", "a%20b", ("0", "a%20b")),
            // 429 is UNAVAILABLE.
            ("17", "nope", ("14", "nope")),
            ("", "nope", ("14", "nope")),
            ("04", &long, ("14", "said")),
            ("-1", "caf\u{e9}", ("14", "said")),
        ] {
            let fields = [("grpc-status", status), ("grpc-message", message)];
            let headers = fields.map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap())
            });
            let headers = HeaderMap::from_iter(headers);
            let reply = Reply { status: StatusCode::TOO_MANY_REQUESTS, headers, body: Bytes::new() }.grpc("said");
            let found = ["grpc-status", "grpc-message"].map(|name| reply.headers[name].to_str().unwrap().to_owned());
            assert_eq!((found[0].as_str(), found[1].as_str()), expected, "{status} {message}");
            assert_eq!(reply.headers.len(), 3, "{status} {message}");
        }
    }

    #[test]
    fn grpc_message_is_bounded() {
        for message in ["a".repeat(20_000), "\u{20ac}".repeat(7000), "a".repeat(LONGEST)] {
            let reply = Reply { status: StatusCode::BAD_REQUEST, headers: HeaderMap::new(), body: Bytes::new() };
            let sent = reply.grpc(&message).headers["grpc-message"].len();
            assert!(sent <= 3 * LONGEST + 100, "{sent}");
            assert_eq!(sent == message.len(), message.len() <= LONGEST, "{sent}");
        }
    }

    #[test]
    fn grpc_is_detected_by_content_type() {
        for (kind, is) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x=y", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]);
            assert_eq!(is_grpc(&headers), is, "{kind}");
        }
    }
}
