//! Writes request heads for endpoints, parses response heads, and writes response heads for clients.
//!
//! Where a response ends decides where the next one on the same connection begins, so a head with two readings is an
//! error and is never forwarded. The body keeps the endpoint's framing byte for byte, so that the kernel can steer it.

use std::{fmt::Write as _, net::SocketAddr};

use bytes::{BufMut, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header, request, response};
use penstock_common::framing::Framing;

use super::{
    digest, fields,
    head::{self, Declared, HeadEnd, HeadError, HeadLimits, shown},
    media,
};

/// How a response's head frames its body (RFC 9112 §6.3), which also depends on the request's method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyKind {
    /// The head is the whole response.
    None,
    /// Content-Length, in bytes.
    Length(u64),
    /// Transfer-Encoding: chunked.
    Chunked,
    /// The close of the connection ends the body.
    UntilClose,
}

/// An endpoint's response without its body.
#[derive(Debug, Clone)]
pub struct ResponseHead {
    /// The endpoint's, until an EPP sets another one.
    pub status: StatusCode,
    /// The version in which the endpoint sent it.
    pub version: Version,
    /// The reason phrase as sent; may be empty.
    pub reason: String,
    /// The fields as sent; [`prepare_response`](super::headers::prepare_response) prepares them for the client.
    pub headers: HeaderMap,
    /// The framing of the body, at its first byte.
    pub framing: Framing,
    /// How the client's head frames the body.
    pub body: BodyKind,
    /// Whether the endpoint connection can be reused after this response.
    pub keep_alive: bool,
    /// 1xx except 101: the final response follows.
    pub interim: bool,
    /// 101: the new protocol of the connection.
    pub upgrade: Option<HeaderValue>,
    /// 426: the protocols that the endpoint requires (RFC 9110 §15.5.22).
    required: Option<HeaderValue>,
    /// Content-Length as sent. Without a body (HEAD, 304) it describes the body that a GET would get.
    content_length: Option<u64>,
}

/// An endpoint's head that cannot be forwarded; the client gets 502.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    #[error(transparent)]
    Head(#[from] HeadError),
    #[error("found the status line \"{found}\", expected `HTTP/1.1 status reason`")]
    StatusLine { found: String },
    #[error("found more than {limit} {what} of interim responses before the response")]
    Interim { limit: usize, what: &'static str },
    #[error("the endpoint switched protocols, which the request did not ask for")]
    SwitchingProtocols,
    #[error("the endpoint violated HTTP/2: {error}")]
    Http2 { error: String },
    #[error("found status {status}, expected a list of models that is not compressed")]
    ModelList { status: StatusCode },
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
            Self::Interim { .. } => "interim_responses",
            Self::SwitchingProtocols => "switching_protocols",
            Self::Http2 { .. } => "http2",
            Self::ModelList { .. } => "model_list",
        }
    }
}

/// Reads the response head at the start of `buf`. Returns it with its length in bytes, or `None` if it is incomplete.
/// See [`ResponseParser`] for heads that arrive in pieces.
///
/// `request_method` is the method of the request: a response to HEAD has no body whatever its fields say.
pub fn parse_response(
    buf: &[u8],
    limits: &HeadLimits,
    request_method: &Method,
) -> Result<Option<(ResponseHead, usize)>, ResponseError> {
    ResponseParser::default().parse(buf, limits, request_method)
}

/// Reads one response head as its bytes arrive, inspecting each byte once until the head is complete.
#[derive(Debug, Default)]
pub struct ResponseParser {
    end: HeadEnd,
}

impl ResponseParser {
    /// Like [`parse_response`]; each call must pass the bytes of the previous calls, followed by new ones.
    pub fn parse(
        &mut self,
        buf: &[u8],
        limits: &HeadLimits,
        request_method: &Method,
    ) -> Result<Option<(ResponseHead, usize)>, ResponseError> {
        const BEGIN: &[u8] = b"HTTP/";
        let window = &buf[..buf.len().min(limits.bytes)];
        // Checked immediately, because an invalid response may never contain a line end.
        if !BEGIN.iter().zip(window).all(|(expected, found)| expected == found) {
            return Err(ResponseError::StatusLine { found: shown(head::start_line(window)) });
        }
        match self.end.find(window)? {
            Some(length) => parse(&window[..length], limits, request_method).map(|head| Some((head, length))),
            None if window.len() < limits.bytes => Ok(None),
            None => Err(HeadError::TooLong { limit: limits.bytes }.into()),
        }
    }
}

/// Parses one complete head.
fn parse(bytes: &[u8], limits: &HeadLimits, request_method: &Method) -> Result<ResponseHead, ResponseError> {
    let line = || ResponseError::StatusLine { found: shown(head::start_line(bytes)) };
    let mut fields = Vec::with_capacity(limits.headers);
    let mut raw = httparse::Response::new(&mut []);
    let fields = &mut fields.spare_capacity_mut()[..limits.headers];
    let config = httparse::ParserConfig::default();
    let read = config.parse_response_with_uninit_headers(&mut raw, bytes, fields);
    let (Ok(httparse::Status::Complete(_)), Some(code), Some(minor)) = (read, raw.code, raw.version) else {
        if let (Err(httparse::Error::Version), Some(known)) = (read, head::as_http11(bytes, 0)) {
            return parse(&known, limits, request_method);
        }
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
    let mut headers = head::fields(raw.headers, limits.headers)?;
    let (declared, clear) = declared(&mut headers, version, never_has_body(status, request_method))?;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    let named = |applies: bool| applies.then(|| head::protocols(&headers)).flatten();
    let (upgrade, required) = (named(switches), named(status == StatusCode::UPGRADE_REQUIRED));
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
    // A 1xx or 204 that declares a body (forbidden by RFC 9112 §6.1 and RFC 9110 §8.6) may be followed by one, and so
    // may a head with ambiguous framing. Nothing may be read after either.
    let bare = status.is_informational() || status == StatusCode::NO_CONTENT;
    let stray_body = !clear || (bare && !matches!(declared, Declared::Nothing | Declared::Length(0)));
    let keep_alive = head::keep_alive(&headers, version) && body != BodyKind::UntilClose && !stray_body && !switches;
    let content_length = if let Declared::Length(bytes) = declared { Some(bytes) } else { None };
    let reason = raw.reason.unwrap_or_default().to_owned();
    Ok(ResponseHead {
        status,
        version,
        reason,
        headers,
        framing,
        body,
        keep_alive,
        interim,
        upgrade,
        required,
        content_length,
    })
}

/// The declared length, and whether it is unambiguous. If the message never has a body, contradictory or invalid fields
/// are removed (RFC 9112 §6.3, first rule), because the next recipient might read them.
fn declared(headers: &mut HeaderMap, version: Version, bodiless: bool) -> Result<(Declared, bool), ResponseError> {
    match head::declared_by_response(headers, version) {
        Err(_) if bodiless => {
            headers.remove(header::CONTENT_LENGTH);
            headers.remove(header::TRANSFER_ENCODING);
            Ok((Declared::Nothing, false))
        }
        declared => {
            let declared = declared?;
            if let Declared::Length(bytes) = declared {
                headers.insert(header::CONTENT_LENGTH, bytes.into());
            }
            Ok((declared, true))
        }
    }
}

/// Converts the head of an HTTP/2 response to a request with this method. `ended`: no body follows.
pub fn from_http2(
    mut parts: response::Parts,
    ended: bool,
    request_method: &Method,
    limits: &HeadLimits,
) -> Result<ResponseHead, ResponseError> {
    limits.check(&parts.headers, 0)?;
    let bodiless = never_has_body(parts.status, request_method);
    let (declared, _) = declared(&mut parts.headers, Version::HTTP_2, bodiless)?;
    let content_length = if let Declared::Length(bytes) = declared { Some(bytes) } else { None };
    let (body, framing) = match body_of(parts.status, request_method, declared) {
        BodyKind::None => (BodyKind::None, Framing::none()),
        // HTTP/1.1 has to declare an empty body.
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
        required: None,
        content_length,
    })
}

/// An interim head that came over HTTP/2.
pub fn interim_from_http2(parts: response::Parts, limits: &HeadLimits) -> Result<ResponseHead, ResponseError> {
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(ResponseError::SwitchingProtocols);
    }
    // Any method: an interim response has no body.
    let head = from_http2(parts, true, &Method::GET, limits)?;
    Ok(ResponseHead { interim: true, ..head })
}

/// Whether the response has no body whatever its fields say (RFC 9112 §6.3, first rule).
fn never_has_body(status: StatusCode, request_method: &Method) -> bool {
    let never = status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    never || request_method == Method::HEAD
}

/// The body's framing by RFC 9112 §6.3, in its order of rules.
fn body_of(status: StatusCode, request_method: &Method, declared: Declared) -> BodyKind {
    match declared {
        _ if never_has_body(status, request_method) => BodyKind::None,
        Declared::Chunked => BodyKind::Chunked,
        Declared::Length(bytes) => BodyKind::Length(bytes),
        Declared::Nothing => BodyKind::UntilClose,
    }
}

impl ResponseHead {
    /// Whether the Content-Type is `text/event-stream`.
    pub(crate) fn is_event_stream(&self) -> bool {
        media::is_events(&self.headers)
    }

    /// Prepares the head for a body that is changed on its way: its length and digests are not known.
    pub fn change_body(&mut self) {
        digest::remove_from_changed(&mut self.headers);
        self.content_length = None;
        if let BodyKind::Length(_) = self.body {
            self.body = BodyKind::Chunked;
        }
    }

    /// Sets the length of a body that was changed before the head is sent.
    pub fn set_length(&mut self, length: u64) {
        self.body = BodyKind::Length(length);
        self.content_length = Some(length);
    }

    /// Whether a chunked body has to be decoded for an HTTP/1.0 client and ended by close.
    pub fn needs_dechunk(&self, client: Version) -> bool {
        self.body == BodyKind::Chunked && client == Version::HTTP_10
    }

    /// An interim head as a client of HTTP/2 gets it: without a length, because it has no body.
    pub fn interim_frames(&self) -> Response<()> {
        let mut head = Response::new(());
        *head.status_mut() = self.status;
        let own = |name: &HeaderName| fields::is_hop_by_hop(name) || name == header::CONTENT_LENGTH;
        let fields = self.headers.iter().filter(|(name, _)| !own(name));
        head.headers_mut().extend(fields.map(|(name, value)| (name.clone(), value.clone())));
        head
    }

    /// The head as a client of HTTP/2 gets it.
    pub fn frames(&self) -> Response<()> {
        let mut head = self.interim_frames();
        let told = match self.body {
            BodyKind::Length(_) => self.content_length,
            BodyKind::None => self.content_length.filter(|_| self.status != StatusCode::NO_CONTENT),
            BodyKind::Chunked | BodyKind::UntilClose => None,
        };
        if let Some(bytes) = told {
            head.headers_mut().insert(header::CONTENT_LENGTH, bytes.into());
        }
        head
    }

    /// Appends the head for an HTTP/1 client. Returns whether the client connection stays open: `keep_alive` says
    /// whether it should, but a body that ends by close overrides it.
    ///
    /// Framing and connection headers follow from [`body`](Self::body), whatever a mutation did to the map. Writes
    /// nothing for an interim head to an HTTP/1.0 client (RFC 9110 §15.2).
    pub fn write_head(&self, out: &mut BytesMut, keep_alive: bool, client: Version) -> bool {
        let ends_by_close = self.body == BodyKind::UntilClose || self.needs_dechunk(client);
        let keep_alive = keep_alive && !ends_by_close;
        if self.interim && client == Version::HTTP_10 {
            return keep_alive;
        }
        // Always the agent's own version (RFC 9110 §6.2), and the space even without a reason phrase (RFC 9112 §4).
        out.put_slice(b"HTTP/1.1 ");
        out.put_slice(self.status.as_str().as_bytes());
        out.put_u8(b' ');
        out.put_slice(self.reason.as_bytes());
        out.put_slice(b"\r\n");
        let own = |name: &HeaderName| fields::is_hop_by_hop(name) || name == header::CONTENT_LENGTH;
        write_fields(&self.headers, own, out);
        match (self.body, self.content_length) {
            (BodyKind::Chunked, _) if !ends_by_close => out.put_slice(b"transfer-encoding: chunked\r\n"),
            (BodyKind::Length(bytes), _) => write_length(bytes, out),
            // RFC 9110 §8.6: neither in 1xx, 101 among them, nor in 204.
            (BodyKind::None, Some(bytes))
                if !self.status.is_informational() && self.status != StatusCode::NO_CONTENT =>
            {
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
        if self.status == StatusCode::UPGRADE_REQUIRED && client == Version::HTTP_11 {
            write_upgrade(self.required.as_ref(), out);
        }
        out.put_slice(b"\r\n");
        keep_alive
    }
}

/// What happens to the connection to an endpoint after its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterResponse<'a> {
    /// It stays open for the next request.
    Keep,
    /// The endpoint is asked to close it (`Connection: close`).
    Close,
    /// It switches to one of these protocols, if the endpoint agrees.
    Upgrade(&'a HeaderValue),
}

/// The framing of a request body toward an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestFraming<'a> {
    /// No body, and no field about one.
    None,
    /// Content-Length, in bytes.
    Length(u64),
    /// Chunked, followed by these trailers.
    Chunked(&'a HeaderMap),
}

/// Appends a request head for `endpoint`: origin form, Host first, the framing of the body that follows, and the
/// requested upgrade. Headers about the client's connection and framing are left out.
pub fn write_request(
    parts: &request::Parts,
    endpoint: SocketAddr,
    framing: RequestFraming<'_>,
    after: AfterResponse<'_>,
    out: &mut BytesMut,
) {
    out.put_slice(parts.method.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(parts.uri.path_and_query().map_or("/", |target| target.as_str()).as_bytes());
    out.put_slice(b" HTTP/1.1\r\nhost: ");
    match parts.headers.get(header::HOST).filter(|host| !host.is_empty()) {
        Some(host) => out.put_slice(host.as_bytes()),
        // An HTTP/1.0 client may have sent no Host, and servers refuse an empty one.
        None => {
            let _ = write!(out, "{endpoint}");
        }
    }
    out.put_slice(b"\r\n");
    let own = |name: &HeaderName| {
        fields::is_hop_by_hop(name)
            || [header::HOST, header::CONTENT_LENGTH, header::EXPECT, header::TRAILER].contains(name)
    };
    write_fields(&parts.headers, own, out);
    match framing {
        RequestFraming::Length(bytes) => write_length(bytes, out),
        RequestFraming::Chunked(trailers) => {
            out.put_slice(b"transfer-encoding: chunked\r\n");
            for name in trailers.keys() {
                let _ = write!(out, "trailer: {name}\r\n");
            }
        }
        // RFC 9110 §8.6: these methods declare an empty body explicitly.
        RequestFraming::None if matches!(parts.method, Method::POST | Method::PUT | Method::PATCH) => {
            write_length(0, out);
        }
        RequestFraming::None => {}
    }
    match after {
        AfterResponse::Keep => {}
        AfterResponse::Close => out.put_slice(b"connection: close\r\n"),
        AfterResponse::Upgrade(protocol) => write_upgrade(Some(protocol), out),
    }
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
    // Writing into a BytesMut fails only if memory is exhausted, and then it aborts.
    let _ = write!(out, "content-length: {bytes}\r\n");
}

#[cfg(test)]
mod tests;
