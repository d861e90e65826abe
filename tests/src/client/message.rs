//! Requests as they are sent, and responses as they were received.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;

use crate::decoder::Framed;

/// A request body and its framing.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    None,
    /// With `content-length`.
    Sized(Bytes),
    /// In chunks of this many bytes.
    Chunked(Bytes, usize),
}

#[derive(Clone, Debug)]
pub struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Body,
    pub(crate) pieces: Option<(usize, Duration)>,
}

impl Request {
    #[must_use]
    pub fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.to_owned(),
            target: target.to_owned(),
            headers: Vec::new(),
            body: Body::None,
            pieces: None,
        }
    }

    #[must_use]
    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    #[must_use]
    pub fn post(target: &str, body: impl Into<Bytes>) -> Self {
        Self::new("POST", target).body(body)
    }

    #[must_use]
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// A body with `content-length`.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Body::Sized(body.into());
        self
    }

    /// A body in chunks of `size` bytes.
    #[must_use]
    pub fn chunked(mut self, body: impl Into<Bytes>, size: usize) -> Self {
        self.body = Body::Chunked(body.into(), size.max(1));
        self
    }

    /// Sends the whole message, head included, in writes of `bytes` with `pause` after each.
    #[must_use]
    pub fn piecewise(mut self, bytes: usize, pause: Duration) -> Self {
        self.pieces = Some((bytes.max(1), pause));
        self
    }

    /// The bytes of the message. `host` applies if the request has no `host` header.
    #[must_use]
    pub fn wire(&self, host: &str) -> Vec<u8> {
        let mut wire = format!("{} {} HTTP/1.1\r\n", self.method, self.target).into_bytes();
        let mut header = |name: &str, value: &str| wire.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        if !self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            header("host", host);
        }
        for (name, value) in &self.headers {
            header(name, value);
        }
        match &self.body {
            Body::None => {}
            Body::Sized(body) => header("content-length", &body.len().to_string()),
            Body::Chunked(..) => header("transfer-encoding", "chunked"),
        }
        wire.extend_from_slice(b"\r\n");
        match &self.body {
            Body::None => {}
            Body::Sized(body) => wire.extend_from_slice(body),
            Body::Chunked(body, size) => {
                for chunk in body.chunks(*size) {
                    wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    wire.extend_from_slice(chunk);
                    wire.extend_from_slice(b"\r\n");
                }
                wire.extend_from_slice(b"0\r\n\r\n");
            }
        }
        wire
    }
}

/// A response head, interim or final.
#[derive(Clone, Debug)]
pub struct Head {
    pub status: u16,
    pub reason: String,
    /// In their received order and case.
    pub headers: Vec<(String, String)>,
    /// The head's bytes.
    pub raw: Bytes,
    /// When its last byte was read.
    pub at: Instant,
}

impl Head {
    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(super) fn framed(&self, to_head: bool) -> Result<Framed> {
        if to_head || self.status < 200 || self.status == 204 || self.status == 304 {
            return Ok(Framed::Nothing);
        }
        if let Some(coding) = self.header("transfer-encoding") {
            if !coding.eq_ignore_ascii_case("chunked") {
                bail!("transfer-encoding {coding}");
            }
            return Ok(Framed::Chunked);
        }
        match self.header("content-length") {
            Some(length) => Ok(Framed::Length(length.parse().with_context(|| format!("content-length {length:?}"))?)),
            None => Ok(Framed::UntilClose),
        }
    }
}

/// Payload bytes received together.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub at: Instant,
    pub len: usize,
}

/// The result of reading a body.
#[derive(Clone, Debug)]
pub struct BodyRead {
    pub end: BodyEnd,
    pub len: u64,
    pub arrivals: Vec<Arrival>,
    pub trailers: Vec<(String, String)>,
    /// Chunks with data, if the body was chunked.
    pub chunks: u64,
    /// Bytes of the body on the wire, framing included.
    pub wire: u64,
}

#[derive(Clone, Debug)]
pub struct Response {
    /// Interim (1xx) heads received first.
    pub interim: Vec<Head>,
    pub head: Head,
    pub body: Vec<u8>,
    pub read: BodyRead,
    /// When the last byte of the request had been written.
    pub sent: Instant,
}

impl Response {
    #[must_use]
    pub fn status(&self) -> u16 {
        self.head.status
    }

    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).with_context(|| format!("body {:?}", self.text()))
    }

    /// The `data:` payloads of an event stream.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        self.text().split("\n\n").filter_map(|event| event.strip_prefix("data: ").map(str::to_owned)).collect()
    }

    /// From the request's last byte to the body's first piece.
    #[must_use]
    pub fn time_to_first_byte(&self) -> Option<Duration> {
        self.read.arrivals.first().map(|first| first.at.saturating_duration_since(self.sent))
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// Where its framing says.
    Complete,
    /// The connection closed orderly before that.
    Truncated,
    /// The connection was reset before that.
    Reset,
}
