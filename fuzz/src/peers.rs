//! Other parsers of the same bytes: hyper, and llhttp inside Node.js.
//!
//! Each takes wire bytes and returns the messages that it found. If a parser finds other messages than the agent does, requests can
//! be smuggled past one of them.

pub mod hyper;
pub mod llhttp;

/// A message as a parser understood it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The method, or the status code.
    pub start: String,
    /// The target; empty for a response.
    pub target: String,
    /// Fields in their order, names in lower case, values trimmed.
    pub fields: Vec<(String, Vec<u8>)>,
    pub body: Vec<u8>,
}

/// The fields of a map in the form of [`Message`].
pub fn fields(headers: &http::HeaderMap) -> Vec<(String, Vec<u8>)> {
    headers.iter().map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().trim_ascii().to_vec())).collect()
}

/// The bytes with HTTP/1.1 instead of a higher minor version, which counts as it (RFC 9110 §2.5), but which the parsers refuse. The
/// version is the last word of a request's first line, and the first of a response's.
pub fn as_http11(wire: &[u8], kind: llhttp::Kind) -> Vec<u8> {
    let mut known = wire.to_vec();
    let begin = wire.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let line = wire[begin..].iter().position(|&byte| byte == b'\r').unwrap_or_default();
    let minor = begin + if matches!(kind, llhttp::Kind::Request) { line.saturating_sub(1) } else { b"HTTP/1.".len() };
    if let Some(minor @ b'2'..=b'9') = known.get_mut(minor) {
        *minor = b'1';
    }
    known
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::{hyper, llhttp, llhttp::Kind};

    #[test]
    fn both_requests_are_found_by_every_parser() {
        let wire = b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n";
        let llhttp = llhttp::read(Kind::Request, wire);
        assert_eq!((llhttp.complete, llhttp.error.as_str()), (2, ""));
        for found in [hyper::requests(wire), llhttp.messages] {
            let [first, second] = &found[..] else { panic!("{found:?}") };
            assert_eq!((first.start.as_str(), first.target.as_str(), &first.body[..]), ("POST", "/a", &b"abc"[..]));
            assert_eq!((second.start.as_str(), second.target.as_str()), ("GET", "/b"));
            assert!(first.fields.contains(&("host".to_owned(), b"h".to_vec())));
        }
    }

    #[test]
    fn smuggled_request_is_found_by_every_parser() {
        let wire = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
        assert!(hyper::requests(wire).iter().any(|message| message.target == "/smuggled"));
        assert!(llhttp::read(Kind::Request, wire).messages.iter().any(|message| message.target == "/smuggled"));
    }

    #[test]
    fn response_is_found_by_every_parser() {
        let wire = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        let hyper = hyper::response(&Method::GET, wire).expect("a response");
        let llhttp = llhttp::read(Kind::Response, wire);
        for found in [&hyper, &llhttp.messages[0]] {
            assert_eq!((found.start.as_str(), &found.body[..]), ("200", &b"abc"[..]));
        }
        assert!(llhttp::read(Kind::ResponseToHead, &wire[..38]).messages[0].body.is_empty());
    }
}
