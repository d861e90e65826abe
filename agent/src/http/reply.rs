//! A whole answer that no endpoint gave: an error of the agent's own, or the picker's.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode, header};

use super::headers;

#[derive(Debug, Clone)]
pub struct Reply {
    pub status: StatusCode,
    /// Fields about framing and connection in it are not sent.
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    /// Appends it as HTTP/1.1. The body is left out where there must be none (RFC 9112 §6.3).
    pub fn write(&self, out: &mut BytesMut, method: &Method, keep_alive: bool) {
        let reason = self.status.canonical_reason().unwrap_or_default();
        out.put_slice(format!("HTTP/1.1 {} {reason}\r\n", self.status.as_u16()).as_bytes());
        for (name, value) in self.fields() {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        if !self.is_bodiless() {
            out.put_slice(format!("content-length: {}\r\n", self.body.len()).as_bytes());
        }
        out.put_slice(if keep_alive { b"\r\n" } else { b"connection: close\r\n\r\n" });
        if !self.is_bodiless() && method != Method::HEAD {
            out.put_slice(&self.body);
        }
    }

    fn fields(&self) -> impl Iterator<Item = (&http::HeaderName, &http::HeaderValue)> {
        let own = |name: &http::HeaderName| name == header::CONTENT_LENGTH || headers::is_hop_by_hop(name);
        self.headers.iter().filter(move |(name, _)| !own(name))
    }

    fn is_bodiless(&self) -> bool {
        self.status == StatusCode::NO_CONTENT || self.status == StatusCode::NOT_MODIFIED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_no_body_where_none_may_be() {
        let rows = [
            (Method::GET, StatusCode::OK, "content-length: 2\r\n\r\nhi"),
            (Method::HEAD, StatusCode::OK, "content-length: 2\r\n\r\n"),
            (Method::GET, StatusCode::NO_CONTENT, "No Content\r\n\r\n"),
            (Method::GET, StatusCode::NOT_MODIFIED, "Not Modified\r\n\r\n"),
        ];
        for (method, status, end) in rows {
            let mut out = BytesMut::new();
            let reply = Reply { status, headers: HeaderMap::new(), body: Bytes::from_static(b"hi") };
            reply.write(&mut out, &method, true);
            assert!(out.ends_with(end.as_bytes()), "{method} {status}: {:?}", String::from_utf8_lossy(&out));
        }
    }
}
