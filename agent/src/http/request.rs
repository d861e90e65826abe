//! Parses request heads strictly: a returned head has only one possible reading.
//!
//! Given the bytes received so far, returns None (incomplete), a head with its length in bytes, or an error that names
//! what was found, what was expected and the status to answer. An accepted target is in origin form or `*`; the
//! authority of an absolute target equals Host, so nothing is lost. After an error the connection must be closed,
//! because the start of the next request is unknown.

use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header, request};

use super::head::{self, Declared, HeadEnd, HeadError, HeadLimits, shown};

/// Empty lines accepted before a request (RFC 9112 §2.2: some clients end a body with an extra CR LF).
const LEADING_BLANK_LINES: usize = 4;
/// The most bytes of a target that `http` reads, whatever `limits.head_bytes` allows.
pub const LONGEST_TARGET: usize = u16::MAX as usize - 1;

/// How a request's head frames its body (RFC 9112 §6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestBody {
    /// The head is the whole request.
    None,
    /// Content-Length, in bytes.
    Length(u64),
    /// Transfer-Encoding: chunked.
    Chunked,
    /// HTTP/2 frames, with the declared length if there is one.
    Frames(Option<u64>),
}

impl RequestBody {
    /// Whether the head is the whole request, or declares an empty body.
    pub fn is_empty(self) -> bool {
        matches!(self, Self::None | Self::Length(0) | Self::Frames(Some(0)))
    }
}

/// A request without its body.
#[derive(Debug, Clone)]
pub struct RequestHead {
    /// The headers as sent; [`super::headers::prepare_request`] prepares them for forwarding.
    pub parts: request::Parts,
    /// The framing of the body that follows.
    pub body: RequestBody,
    /// Whether the client allows the connection to be reused.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expect_continue: bool,
    /// The protocols that the client wants to switch to, as a list.
    pub upgrade: Option<HeaderValue>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("found more than {LEADING_BLANK_LINES} empty lines, expected a request")]
    BlankLines,
    #[error("found the request line \"{found}\", expected `METHOD target HTTP/1.1`")]
    RequestLine { found: String },
    #[error("the request line does not end within {limit} bytes")]
    RequestLineTooLong { limit: usize },
    #[error("the target is longer than {limit} bytes")]
    TargetTooLong { limit: usize },
    #[error("found the HTTP/2 preface, expected HTTP/1.1")]
    Http2Preface,
    #[error("found version \"{found}\", expected HTTP/1.1 or HTTP/1.0")]
    Version { found: String },
    #[error("method {found} is not implemented")]
    Method { found: String },
    #[error(
        "found target \"{found}\", expected a path, or an http or https URL, without bytes that must be percent-encoded"
    )]
    Target { found: String },
    #[error("found target `*` with method {method}, expected it only with OPTIONS")]
    Asterisk { method: String },
    #[error("found no Host field, expected one")]
    HostMissing,
    #[error("found several Host fields, \"{found}\", expected one")]
    HostRepeated { found: String },
    #[error("found Host \"{found}\", expected a host name or address with an optional port")]
    Host { found: String },
    #[error("found target \"{target}\" with Host \"{host}\", expected the same host in both")]
    HostMismatch { target: String, host: String },
    #[error("found Expect \"{found}\", expected `100-continue` or no Expect field")]
    Expectation { found: String },
}

impl RequestError {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Head(fault) => fault.status(),
            Self::RequestLineTooLong { .. } | Self::TargetTooLong { .. } => StatusCode::URI_TOO_LONG,
            Self::Http2Preface | Self::Version { .. } => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            // Not 405: no resource has these methods, and 405 would require an Allow header (RFC 9110 §15.5.6).
            Self::Method { .. } => StatusCode::NOT_IMPLEMENTED,
            Self::Expectation { .. } => StatusCode::EXPECTATION_FAILED,
            Self::BlankLines
            | Self::RequestLine { .. }
            | Self::Target { .. }
            | Self::Asterisk { .. }
            | Self::HostMissing
            | Self::HostRepeated { .. }
            | Self::Host { .. }
            | Self::HostMismatch { .. } => StatusCode::BAD_REQUEST,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Head(fault) => fault.reason(),
            Self::BlankLines => "blank_lines",
            Self::RequestLine { .. } => "request_line",
            Self::RequestLineTooLong { .. } | Self::TargetTooLong { .. } => "request_line_too_long",
            Self::Http2Preface => "http2_preface",
            Self::Version { .. } => "version",
            Self::Method { .. } => "method",
            Self::Target { .. } => "target",
            Self::Asterisk { .. } => "asterisk_target",
            Self::HostMissing => "host_missing",
            Self::HostRepeated { .. } => "host_repeated",
            Self::Host { .. } => "host",
            Self::HostMismatch { .. } => "host_mismatch",
            Self::Expectation { .. } => "expectation",
        }
    }
}

/// Reads the request head at the start of `buf`. Returns it with its length in bytes, accepted empty lines included, or
/// `None` if it is incomplete. See [`RequestParser`] for heads that arrive in pieces.
pub fn parse_request(buf: &[u8], limits: &HeadLimits) -> Result<Option<(RequestHead, usize)>, RequestError> {
    RequestParser::default().parse(buf, limits)
}

/// Reads one request head as its bytes arrive, inspecting each byte once until the head is complete.
#[derive(Debug, Default)]
pub struct RequestParser {
    /// Bytes of empty lines before the head.
    skip: usize,
    end: HeadEnd,
}

impl RequestParser {
    /// Like [`parse_request`]; each call must pass the bytes of the previous calls, followed by new ones.
    pub fn parse(&mut self, buf: &[u8], limits: &HeadLimits) -> Result<Option<(RequestHead, usize)>, RequestError> {
        let window = &buf[..buf.len().min(limits.bytes)];
        while window[self.skip..].starts_with(b"\r\n") {
            self.skip += 2;
            if self.skip > 2 * LEADING_BLANK_LINES {
                return Err(RequestError::BlankLines);
            }
        }
        let head = &window[self.skip..];
        // Either half of an empty line, or the first byte of an invalid head.
        if head == b"\r" && window.len() < limits.bytes {
            return Ok(None);
        }
        match self.end.find(head)? {
            Some(length) => parse(&head[..length], limits).map(|head| Some((head, self.skip + length))),
            None if window.len() < limits.bytes => Ok(None),
            None if head.contains(&b'\n') => Err(HeadError::TooLong { limit: limits.bytes }.into()),
            None => Err(RequestError::RequestLineTooLong { limit: limits.bytes }),
        }
    }
}

/// Converts the head of an HTTP/2 request to the form of HTTP/1.1. h2 has refused what RFC 9113 §8.2 forbids.
/// `ended`: no body follows. Takes `parts` unless the head is refused.
pub fn from_http2(parts: &mut request::Parts, ended: bool, limits: &HeadLimits) -> Result<RequestHead, RequestError> {
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Err(RequestError::Method { found: parts.method.to_string() });
    }
    // RFC 9113 §8.2.3: cookies may arrive in several fields.
    let cookies = || parts.headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    if cookies().nth(1).is_some() {
        // A value that ends in white space would be refused.
        let cookies: Vec<&[u8]> = cookies().filter(|cookie| !cookie.is_empty()).collect();
        let joined = cookies.join(&b"; "[..]);
        if let Ok(joined) = HeaderValue::from_maybe_shared(bytes::Bytes::from(joined)) {
            parts.headers.insert(header::COOKIE, joined);
        }
    }
    limits.check(&parts.headers, parts.uri.path_and_query().map_or(0, |path| path.as_str().len()))?;
    let target = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let authority = match parts.uri.authority() {
        Some(text) => {
            let wrong = || RequestError::Host { found: shown(text.as_str().as_bytes()) };
            let (host, port) = parse_host(text.as_str().as_bytes()).ok_or_else(wrong)?;
            let default_port = if parts.uri.scheme_str() == Some("https") { 443 } else { 80 };
            Some(Authority { text: text.as_str().to_owned(), host, port, default_port })
        }
        None => None,
    };
    // As in HTTP/1.0, the host may be in the target only.
    let lenient = if authority.is_some() { Version::HTTP_10 } else { Version::HTTP_11 };
    check_host(&mut parts.headers, lenient, authority.as_ref())?;
    parts.uri = parse_target(&parts.method, &target)?.uri;
    let body = match head::declared(&parts.headers, Version::HTTP_2)? {
        _ if ended => RequestBody::None,
        Declared::Length(bytes) => RequestBody::Frames(Some(bytes)),
        Declared::Nothing | Declared::Chunked => RequestBody::Frames(None),
    };
    let expect_continue = expects_continue(&parts.headers)? && !body.is_empty();
    parts.headers.remove(header::EXPECT);
    let (empty, ()) = http::Request::new(()).into_parts();
    let parts = std::mem::replace(parts, empty);
    Ok(RequestHead { parts, body, keep_alive: true, expect_continue, upgrade: None })
}

/// Parses one complete head.
fn parse(bytes: &[u8], limits: &HeadLimits) -> Result<RequestHead, RequestError> {
    let mut fields = Vec::with_capacity(limits.headers);
    let mut raw = httparse::Request::new(&mut []);
    let fields = &mut fields.spare_capacity_mut()[..limits.headers];
    let read = raw.parse_with_uninit_headers(bytes, fields);
    let (Ok(httparse::Status::Complete(_)), Some(method), Some(target), Some(minor)) =
        (read, raw.method, raw.path, raw.version)
    else {
        // A method, a target and a version, if httparse came as far as the version.
        let version = head::start_line(bytes).len().checked_sub("HTTP/1.1".len());
        let known = version.filter(|_| read == Err(httparse::Error::Version)).and_then(|at| head::as_http11(bytes, at));
        return known.map_or_else(|| Err(fault(bytes, read.err(), limits)), |known| parse(&known, limits));
    };

    let line = || RequestError::RequestLine { found: shown(head::start_line(bytes)) };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| line())?;
    let version = if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    let mut headers = head::fields(raw.headers, limits.headers)?;

    if matches!(method, Method::CONNECT | Method::TRACE) {
        return Err(RequestError::Method { found: method.to_string() });
    }
    let target = parse_target(&method, target)?;
    check_host(&mut headers, version, target.authority.as_ref())?;
    let body = match head::declared(&headers, version)? {
        Declared::Nothing => RequestBody::None,
        Declared::Length(bytes) => RequestBody::Length(bytes),
        Declared::Chunked => RequestBody::Chunked,
    };
    // RFC 9110 §10.1.1: an HTTP/1.0 client does not wait, and neither does a request without a body.
    let expect_continue = expects_continue(&headers)? && version == Version::HTTP_11 && !body.is_empty();
    let keep_alive = head::keep_alive(&headers, version);
    let upgrade = head::upgrade(&headers, version);

    let (mut parts, ()) = http::Request::new(()).into_parts();
    (parts.method, parts.uri, parts.version, parts.headers) = (method, target.uri, version, headers);
    Ok(RequestHead { parts, body, keep_alive, expect_continue, upgrade })
}

/// The reason why `httparse` refused the head.
fn fault(bytes: &[u8], error: Option<httparse::Error>, limits: &HeadLimits) -> RequestError {
    let line = head::start_line(bytes);
    let words: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    match (error, words.as_slice()) {
        (Some(httparse::Error::TooManyHeaders), _) => HeadError::TooManyFields { limit: limits.headers }.into(),
        (_, [b"PRI", b"*", b"HTTP/2.0"]) => RequestError::Http2Preface,
        (Some(httparse::Error::Version), [_, _, version]) if is_version(version) => {
            RequestError::Version { found: shown(version) }
        }
        // For httparse, a bad byte in the request line is `Token`, one in a field line `HeaderName` or `HeaderValue`.
        (Some(httparse::Error::Token | httparse::Error::Version | httparse::Error::NewLine), _) => {
            RequestError::RequestLine { found: shown(line) }
        }
        _ => head::field_fault(bytes)
            .map_or_else(|| RequestError::RequestLine { found: shown(line) }, RequestError::Head),
    }
}

/// Whether `word` is `HTTP/` digit `.` digit (RFC 9112 §2.3).
fn is_version(word: &[u8]) -> bool {
    matches!(word, [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit())
}

struct RequestTarget {
    /// Origin form, or `*`.
    uri: Uri,
    /// The authority of an absolute target: host, port, and the default port of the scheme.
    authority: Option<Authority>,
}

/// Parses origin form, absolute form or `*` (RFC 9112 §3.2). Authority form belongs to CONNECT.
fn parse_target(method: &Method, target: &str) -> Result<RequestTarget, RequestError> {
    let wrong = || RequestError::Target { found: shown(target.as_bytes()) };
    // A fragment is never sent, and bytes beyond ASCII have no agreed meaning; `http` would cut the former and accept
    // the latter.
    if !target.bytes().all(|b| matches!(b, 0x21..=0x7e) && b != b'#') {
        return Err(wrong());
    }
    if target == "*" && method != Method::OPTIONS {
        return Err(RequestError::Asterisk { method: method.to_string() });
    }
    if target == "*" || target.starts_with('/') {
        return Ok(RequestTarget { uri: uri_of(target)?, authority: None });
    }
    let (scheme, rest) = target.split_once("://").ok_or_else(wrong)?;
    let default_port = match scheme.to_ascii_lowercase().as_str() {
        "http" => 80,
        "https" => 443,
        _ => return Err(wrong()),
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (host, port) = parse_host(authority.as_bytes()).ok_or_else(wrong)?;
    let origin = match path {
        // RFC 9112 §3.2.4: OPTIONS for a whole server is forwarded as `*`.
        "" if method == Method::OPTIONS => "*".to_owned(),
        _ if path.starts_with('/') => path.to_owned(),
        _ => format!("/{path}"),
    };
    let authority = Authority { text: authority.to_owned(), host, port, default_port };
    Ok(RequestTarget { uri: uri_of(&origin)?, authority: Some(authority) })
}

/// Reads origin form or `*`.
fn uri_of(target: &str) -> Result<Uri, RequestError> {
    if target.len() > LONGEST_TARGET {
        return Err(RequestError::TargetTooLong { limit: LONGEST_TARGET });
    }
    target.parse().map_err(|_| RequestError::Target { found: shown(target.as_bytes()) })
}

struct Authority {
    text: String,
    host: String,
    port: Option<u16>,
    default_port: u16,
}

/// Checks RFC 9112 §3.2: exactly one valid Host in HTTP/1.1, at most one in HTTP/1.0, equal to that of an absolute
/// target. An empty Host names no host: an absolute target replaces it, and HTTP/1.0 does not need one.
fn check_host(headers: &mut HeaderMap, version: Version, target: Option<&Authority>) -> Result<(), RequestError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(RequestError::HostRepeated { found: shown(&head::joined(headers, &header::HOST)) });
    }
    let named = host.filter(|host| !host.is_empty() || (version == Version::HTTP_11 && target.is_none()));
    let Some(value) = named else {
        if version == Version::HTTP_11 && host.is_none() {
            return Err(RequestError::HostMissing);
        }
        match target.and_then(|t| HeaderValue::from_str(&t.text).ok()) {
            Some(value) => drop(headers.insert(header::HOST, value)),
            None => drop(headers.remove(header::HOST)),
        }
        return Ok(());
    };
    let found = || shown(value.as_bytes());
    let (host, port) = parse_host(value.as_bytes()).ok_or_else(|| RequestError::Host { found: found() })?;
    match target {
        Some(t) if t.host != host || t.port.unwrap_or(t.default_port) != port.unwrap_or(t.default_port) => {
            Err(RequestError::HostMismatch { target: shown(t.text.as_bytes()), host: found() })
        }
        _ => Ok(()),
    }
}

/// Parses `uri-host [":" port]` (RFC 9110 §7.2, RFC 3986 §3.2.2), host in lower case. User information and an empty
/// host are invalid, and so are percent-encoded bytes: `h2` takes them in no `:authority`.
fn parse_host(value: &[u8]) -> Option<(String, Option<u16>)> {
    let text = std::str::from_utf8(value).ok()?;
    let split = if text.starts_with('[') { text.find(']')? + 1 } else { text.find(':').unwrap_or(text.len()) };
    let (host, port) = text.split_at(split);
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        Some("") => None,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => Some(digits.parse().ok()?),
        _ => return None,
    };
    let valid = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&b)),
    };
    valid.then(|| (host.to_ascii_lowercase(), port))
}

/// Whether the client expects `100-continue`, the only expectation defined (RFC 9110 §10.1.1).
fn expects_continue(headers: &HeaderMap) -> Result<bool, RequestError> {
    if !headers.contains_key(header::EXPECT) {
        return Ok(false);
    }
    let value = head::joined(headers, &header::EXPECT);
    let mut waits = false;
    for element in head::elements(&value) {
        if !element.eq_ignore_ascii_case(b"100-continue") {
            return Err(RequestError::Expectation { found: shown(&value) });
        }
        waits = true;
    }
    Ok(waits)
}

#[cfg(test)]
mod tests;
