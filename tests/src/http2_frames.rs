//! Raw HTTP/2 frames (RFC 9113 §4.1) and header blocks of literal fields (RFC 7541 §6.2.2), for messages that no library would
//! send.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longest wait for a frame.
const PATIENCE: Duration = Duration::from_secs(10);

/// Frame types.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    #[must_use]
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, flags, stream, payload: payload.into() }
    }

    /// A HEADERS frame with the whole head.
    #[must_use]
    pub fn headers(stream: u32, ends: bool, fields: &[(&str, &str)]) -> Self {
        Self::new(kind::HEADERS, END_HEADERS | u8::from(ends), stream, block(fields))
    }

    /// Grants this many more bytes on the stream, or on the connection if 0.
    #[must_use]
    pub fn window(stream: u32, bytes: u32) -> Self {
        Self::new(kind::WINDOW_UPDATE, 0, stream, bytes.to_be_bytes())
    }

    /// SETTINGS with this initial stream window (RFC 9113 §6.5.2).
    #[must_use]
    pub fn initial_window(bytes: u32) -> Self {
        Self::new(kind::SETTINGS, 0, 0, [&4_u16.to_be_bytes()[..], &bytes.to_be_bytes()].concat())
    }

    #[must_use]
    pub fn reset(stream: u32, error: u32) -> Self {
        Self::new(kind::RST_STREAM, 0, stream, error.to_be_bytes())
    }

    #[must_use]
    pub fn wire(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("the frame is too long").to_be_bytes();
        let mut wire = length[1..].to_vec();
        wire.extend([self.kind, self.flags]);
        wire.extend(self.stream.to_be_bytes());
        wire.extend_from_slice(&self.payload);
        wire
    }

    /// The status of a response head whose first byte encodes it.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        let indexed = [200, 204, 206, 304, 400, 404, 500];
        let first = usize::from(*self.payload.first().filter(|_| self.kind == kind::HEADERS)?);
        indexed.get(first.checked_sub(0x88)?).copied()
    }

    /// The error code of a RST_STREAM or GOAWAY.
    #[must_use]
    pub fn error(&self) -> Option<u32> {
        let at = match self.kind {
            kind::RST_STREAM => 0,
            kind::GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }
}

/// Literal fields with literal names, without indexing.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            length(text.len(), &mut block);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// An integer with a seven-bit prefix (RFC 7541 §5.1).
fn length(length: usize, block: &mut Vec<u8>) {
    if length < 127 {
        return block.push(length as u8);
    }
    block.push(127);
    let mut rest = length - 127;
    while rest >= 128 {
        block.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    block.push(rest as u8);
}

/// One end of a connection.
pub struct Http2Frames {
    stream: TcpStream,
}

impl Http2Frames {
    /// A client after its preface and SETTINGS.
    pub async fn connect(peer: SocketAddr) -> Result<Self> {
        Self::connect_with(peer, &Frame::new(kind::SETTINGS, 0, 0, [])).await
    }

    /// Like [`Self::connect`], with these settings.
    pub async fn connect_with(peer: SocketAddr, settings: &Frame) -> Result<Self> {
        let mut connection = Self::new(TcpStream::connect(peer).await?)?;
        connection.send_raw(&[PREFACE, &settings.wire()].concat()).await?;
        Ok(connection)
    }

    /// A server after the exchange of preface and SETTINGS.
    pub async fn accept(stream: TcpStream) -> Result<Self> {
        let mut connection = Self::new(stream)?;
        let mut preface = [0; PREFACE.len()];
        connection.stream.read_exact(&mut preface).await?;
        ensure!(preface == PREFACE, "expected a preface, found {:?}", preface.escape_ascii().to_string());
        connection.send(&Frame::new(kind::SETTINGS, 0, 0, [])).await?;
        Ok(connection)
    }

    /// A connection without any traffic yet.
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream })
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    pub async fn send(&mut self, frame: &Frame) -> Result<()> {
        self.send_raw(&frame.wire()).await
    }

    /// Closes with a reset.
    pub fn reset(self) -> Result<()> {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }

    /// The next frame; `None` at the end of the connection. Acknowledges SETTINGS and PING.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        let mut head = [0; 9];
        match timeout(PATIENCE, self.stream.read_exact(&mut head)).await.context("timed out waiting for a frame")? {
            Ok(_) => {}
            Err(_) => return Ok(None),
        }
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.stream.read_exact(&mut payload).await?;
        let frame = Frame { kind, flags, stream: u32::from_be_bytes(stream) & 0x7fff_ffff, payload };
        let answer: &[u8] = if frame.kind == kind::PING { &frame.payload } else { &[] };
        if matches!(frame.kind, kind::SETTINGS | kind::PING) && frame.flags == 0 {
            // A departed peer is noticed at the next read.
            let _ = self.send(&Frame::new(frame.kind, 1, 0, answer)).await;
        }
        Ok(Some(frame))
    }

    /// The next frame that satisfies `wanted`; `None` at the end of the connection.
    pub async fn find(&mut self, mut wanted: impl FnMut(&Frame) -> bool) -> Result<Option<Frame>> {
        while let Some(frame) = self.next().await? {
            if wanted(&frame) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }
}
