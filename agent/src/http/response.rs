//! Heads on the way to an endpoint and back: the request head that is sent, the response head that is read, and the
//! response head that goes on to the client.
//!
//! Where a response ends decides whether the next one on the same connection is read in the right place, so a head with
//! two readings is an error and never forwarded. The body toward the client keeps the endpoint's framing byte for byte,
//! which is what lets the kernel carry it.

use std::fmt::Write as _;

use bytes::{BufMut, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header, request, response};
use penstock_common::framing::Framing;

use super::{
    head::{self, Declared, HeadEnd, HeadError, HeadLimits, shown},
    headers,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyKind {
    None,
    Length(u64),
    Chunked,
    UntilClose,
}

#[derive(Debug, Clone)]
pub struct ResponseHead {
    pub status: StatusCode,
    pub version: Version,
    /// The reason phrase as sent, which may be empty.
    pub reason: String,
    pub headers: HeaderMap,
    /// Ready for the first byte of the body.
    pub framing: Framing,
    pub body: BodyKind,
    /// The endpoint's connection can be used again after this response.
    pub keep_alive: bool,
    /// 1xx but 101: the real response is still to come.
    pub interim: bool,
    /// 101: what the connection is from now on.
    pub upgrade: Option<HeaderValue>,
    /// Content-Length as sent. Without a body (HEAD, 304) it describes the body that a GET would have got.
    content_length: Option<u64>,
}

/// An endpoint's head that must not be forwarded; each answers the client 502.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("found the status line \"{found}\", expected `HTTP/1.1 status reason`")]
    StatusLine { found: String },
    #[error("found an interim response, status {status}, that declares a body")]
    InterimBody { status: u16 },
    #[error("the endpoint switches protocols, which the request has not asked for")]
    SwitchingProtocols,
}

impl ResponseError {
    pub fn status(&self) -> StatusCode {
        StatusCode::BAD_GATEWAY
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Head(fault) => fault.reason(),
            Self::StatusLine { .. } => "status_line",
            Self::InterimBody { .. } => "interim_body",
            Self::SwitchingProtocols => "switching_protocols",
        }
    }
}

/// Reads the response head that starts `buf`; with it its length in bytes. `None`: more bytes are needed. For a head that
/// arrives piece by piece see [`ResponseParser`].
///
/// `request_method` is that of the request it answers: a response to HEAD has no body whatever its fields say.
pub fn parse_response(
    buf: &[u8],
    limits: &HeadLimits,
    request_method: &Method,
) -> Result<Option<(ResponseHead, usize)>, ResponseError> {
    ResponseParser::default().parse(buf, limits, request_method)
}

/// Reads one response head while its bytes arrive. However they are cut, each is looked at once until the head is complete.
#[derive(Debug, Default)]
pub struct ResponseParser {
    end: HeadEnd,
}

impl ResponseParser {
    /// As [`parse_response`]; each call is given the bytes of the calls before, and more behind them.
    pub fn parse(
        &mut self,
        buf: &[u8],
        limits: &HeadLimits,
        request_method: &Method,
    ) -> Result<Option<(ResponseHead, usize)>, ResponseError> {
        let window = &buf[..buf.len().min(limits.bytes)];
        match self.end.find(window)? {
            Some(length) => parse(&window[..length], limits, request_method).map(|head| Some((head, length))),
            None if window.len() < limits.bytes => Ok(None),
            None => Err(HeadError::TooLong { limit: limits.bytes }.into()),
        }
    }
}

/// Reads one complete head.
fn parse(bytes: &[u8], limits: &HeadLimits, request_method: &Method) -> Result<ResponseHead, ResponseError> {
    let line = || ResponseError::StatusLine { found: shown(head::start_line(bytes)) };
    let mut fields = Vec::with_capacity(limits.headers);
    let mut raw = httparse::Response::new(&mut []);
    let fields = &mut fields.spare_capacity_mut()[..limits.headers];
    let config = httparse::ParserConfig::default();
    let read = config.parse_response_with_uninit_headers(&mut raw, bytes, fields);
    let (Ok(httparse::Status::Complete(_)), Some(code), Some(minor)) = (read, raw.code, raw.version) else {
        return Err(match read.err() {
            Some(httparse::Error::TooManyHeaders) => HeadError::TooManyFields { limit: limits.headers }.into(),
            Some(httparse::Error::HeaderName | httparse::Error::HeaderValue) => {
                head::field_fault(bytes).map_or_else(line, ResponseError::Head)
            }
            _ => line(),
        });
    };
    let status = StatusCode::from_u16(code).map_err(|_| line())?;
    let version = if minor == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    let headers = head::fields(raw.headers, limits.headers)?;
    let declared = head::declared(&headers, version)?;
    if status.is_informational() && !matches!(declared, Declared::Nothing | Declared::Length(0)) {
        return Err(ResponseError::InterimBody { status: code });
    }
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    let upgrade = headers.get(header::UPGRADE).filter(|_| switches).cloned();
    if switches && upgrade.is_none() {
        return Err(ResponseError::SwitchingProtocols);
    }
    let interim = status.is_informational() && !switches;

    let body = body_of(status, request_method, declared);
    let framing = match body {
        BodyKind::None => Framing::none(),
        BodyKind::Length(bytes) => Framing::length(bytes),
        BodyKind::Chunked => Framing::chunked(),
        BodyKind::UntilClose => Framing::until_close(),
    };
    // A 204 that declares a body (RFC 9110 §6.4.1 forbids it) may be followed by one: nothing may be read after it.
    let stray_body = status == StatusCode::NO_CONTENT && !matches!(declared, Declared::Nothing | Declared::Length(0));
    let keep_alive = head::keep_alive(&headers, version) && body != BodyKind::UntilClose && !stray_body && !switches;
    let content_length = if let Declared::Length(bytes) = declared { Some(bytes) } else { None };
    let reason = raw.reason.unwrap_or_default().to_owned();
    Ok(ResponseHead { status, version, reason, headers, framing, body, keep_alive, interim, upgrade, content_length })
}

/// A head that came over HTTP/2 in answer to a request with this method; `ended`: nothing follows.
pub fn from_http2(
    parts: response::Parts,
    ended: bool,
    request_method: &Method,
    limits: &HeadLimits,
) -> Result<ResponseHead, ResponseError> {
    if parts.headers.len() > limits.headers {
        return Err(HeadError::TooManyFields { limit: limits.headers }.into());
    }
    let declared = head::declared(&parts.headers, Version::HTTP_2)?;
    let content_length = if let Declared::Length(bytes) = declared { Some(bytes) } else { None };
    let (body, framing) = match body_of(parts.status, request_method, declared) {
        BodyKind::None => (BodyKind::None, Framing::none()),
        // HTTP/1.1 has to say so.
        _ if ended => (BodyKind::Length(0), Framing::none()),
        BodyKind::Length(bytes) => (BodyKind::Length(bytes), Framing::length(bytes)),
        BodyKind::Chunked | BodyKind::UntilClose => (BodyKind::Chunked, Framing::chunked()),
    };
    Ok(ResponseHead {
        status: parts.status,
        version: Version::HTTP_2,
        reason: parts.status.canonical_reason().unwrap_or_default().to_owned(),
        headers: parts.headers,
        framing,
        body,
        keep_alive: true,
        interim: false,
        upgrade: None,
        content_length,
    })
}

/// RFC 9112 §6.3, in its order.
fn body_of(status: StatusCode, request_method: &Method, declared: Declared) -> BodyKind {
    let never = status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    match declared {
        _ if never || request_method == Method::HEAD => BodyKind::None,
        Declared::Chunked => BodyKind::Chunked,
        Declared::Length(bytes) => BodyKind::Length(bytes),
        Declared::Nothing => BodyKind::UntilClose,
    }
}

impl ResponseHead {
    /// `Content-Type: text/event-stream`, whatever its parameters.
    pub fn is_event_stream(&self) -> bool {
        const KIND: &[u8] = b"text/event-stream";
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.as_bytes().get(..KIND.len()));
        kind.is_some_and(|kind| kind.eq_ignore_ascii_case(KIND))
    }

    /// A chunked body for an HTTP/1.0 client, which knows no chunks: the body must be sent decoded, until close.
    pub fn needs_dechunk(&self, client: Version) -> bool {
        self.body == BodyKind::Chunked && client == Version::HTTP_10
    }

    /// The head as a client of HTTP/2 gets it, and the length of the body where it is known.
    pub fn frames(&self) -> (Response<()>, Option<u64>) {
        let mut head = Response::new(());
        *head.status_mut() = self.status;
        let own = |name: &HeaderName| headers::is_hop_by_hop(name) || name == header::CONTENT_LENGTH;
        let fields = self.headers.iter().filter(|(name, _)| !own(name));
        head.headers_mut().extend(fields.map(|(name, value)| (name.clone(), value.clone())));
        let told = match self.body {
            BodyKind::Length(_) => self.content_length,
            BodyKind::None => self.content_length.filter(|_| self.status != StatusCode::NO_CONTENT),
            BodyKind::Chunked | BodyKind::UntilClose => None,
        };
        if let Some(bytes) = told {
            head.headers_mut().insert(header::CONTENT_LENGTH, bytes.into());
        }
        (head, told.filter(|_| self.body != BodyKind::None))
    }

    /// Appends the head as the client gets it. Returns whether the client's connection stays open afterwards: `keep_alive`
    /// is the wish, and a body that only the close ends overrides it.
    ///
    /// Framing and connection fields follow from [`body`](Self::body), whatever a mutation did to the map. An interim head
    /// for an HTTP/1.0 client writes nothing (RFC 9110 §15.2).
    pub fn write_head(&self, out: &mut BytesMut, keep_alive: bool, client: Version) -> bool {
        let ends_by_close = self.body == BodyKind::UntilClose || self.needs_dechunk(client);
        let keep_alive = keep_alive && !ends_by_close;
        if self.interim && client == Version::HTTP_10 {
            return keep_alive;
        }
        // Always our own version (RFC 9110 §6.2), and the space even without a reason (RFC 9112 §4).
        out.put_slice(b"HTTP/1.1 ");
        out.put_slice(self.status.as_str().as_bytes());
        out.put_u8(b' ');
        out.put_slice(self.reason.as_bytes());
        out.put_slice(b"\r\n");
        let own = |name: &HeaderName| headers::is_hop_by_hop(name) || name == header::CONTENT_LENGTH;
        write_fields(&self.headers, own, out);
        match (self.body, self.content_length) {
            (BodyKind::Chunked, _) if !ends_by_close => out.put_slice(b"transfer-encoding: chunked\r\n"),
            (BodyKind::Length(bytes), _) => write_length(bytes, out),
            (BodyKind::None, Some(bytes)) if !self.interim && self.status != StatusCode::NO_CONTENT => {
                write_length(bytes, out);
            }
            _ => {}
        }
        match (self.interim, keep_alive) {
            _ if self.upgrade.is_some() => write_upgrade(self.upgrade.as_ref(), out),
            (false, false) => out.put_slice(b"connection: close\r\n"),
            (false, true) if client == Version::HTTP_10 => out.put_slice(b"connection: keep-alive\r\n"),
            _ => {}
        }
        out.put_slice(b"\r\n");
        keep_alive
    }
}

/// Appends a request head as an endpoint gets it: origin form, Host first, and the length of the body that will follow
/// (`None`: there is none), and the protocol that the client wants to go on with. Fields about the client's connection and
/// framing are left out.
pub fn write_request(parts: &request::Parts, body_len: Option<u64>, upgrade: Option<&HeaderValue>, out: &mut BytesMut) {
    out.put_slice(parts.method.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(parts.uri.path_and_query().map_or("/", |target| target.as_str()).as_bytes());
    // An HTTP/1.0 client may have sent no Host; empty is how HTTP/1.1 says so (RFC 9112 §3.2).
    out.put_slice(b" HTTP/1.1\r\nhost: ");
    out.put_slice(parts.headers.get(header::HOST).map_or(b"", |host| host.as_bytes()));
    out.put_slice(b"\r\n");
    let own = |name: &HeaderName| {
        headers::is_hop_by_hop(name)
            || [header::HOST, header::CONTENT_LENGTH, header::EXPECT, header::TRAILER].contains(name)
    };
    write_fields(&parts.headers, own, out);
    match body_len {
        Some(bytes) => write_length(bytes, out),
        // RFC 9110 §8.6: these methods say so when they send no body.
        None if matches!(parts.method, Method::POST | Method::PUT | Method::PATCH) => write_length(0, out),
        None => {}
    }
    write_upgrade(upgrade, out);
    out.put_slice(b"\r\n");
}

fn write_upgrade(protocol: Option<&HeaderValue>, out: &mut BytesMut) {
    if let Some(protocol) = protocol {
        out.put_slice(b"connection: upgrade\r\nupgrade: ");
        out.put_slice(protocol.as_bytes());
        out.put_slice(b"\r\n");
    }
}

fn write_fields(fields: &HeaderMap, own: impl Fn(&HeaderName) -> bool, out: &mut BytesMut) {
    for (name, value) in fields.iter().filter(|(name, _)| !own(name)) {
        out.put_slice(name.as_str().as_bytes());
        out.put_slice(b": ");
        out.put_slice(value.as_bytes());
        out.put_slice(b"\r\n");
    }
}

fn write_length(bytes: u64, out: &mut BytesMut) {
    // Writing into a BytesMut fails only when memory cannot be had, and then it aborts.
    let _ = write!(out, "content-length: {bytes}\r\n");
}

#[cfg(test)]
mod tests;
