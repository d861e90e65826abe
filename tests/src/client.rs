//! An exact HTTP/1.1 client on one connection, plain or TLS. It sends given bytes in given pieces and reports what was received,
//! when, and how it ended. It never retries, follows redirects or reconnects. Its [`Decoder`] shares no code with the agent.
//!
//! It reads only inside calls: between calls, the client is stalled.

mod message;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

pub(crate) use self::message::Body;
pub use self::message::{Arrival, BodyEnd, BodyRead, Head, Request, Response};
use crate::decoder::{Decoder, Framed};

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionEnd {
    Fin,
    Reset,
}

/// How fast the client reads a body from the socket.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    Fast,
    /// At most `bytes` every `tick`.
    Slow {
        bytes: usize,
        tick: Duration,
    },
}

/// One step of reading a body.
#[derive(Clone, Debug)]
pub enum Piece {
    Data(Bytes),
    End(BodyEnd),
}

pub struct Client<S = TcpStream> {
    stream: S,
    peer: SocketAddr,
    buffer: BytesMut,
    /// One entry per request without a final head yet: whether it was HEAD.
    awaited: VecDeque<bool>,
    decoder: Option<Decoder>,
    /// Wire bytes of the body so far.
    wire: u64,
    /// How the connection ended. The socket reports it once; later reads return it from here.
    ended: Option<ConnectionEnd>,
    recorded: Option<Vec<u8>>,
    sent: Instant,
    /// Longest wait for a byte, after which a call fails. Default: ten seconds.
    pub patience: Duration,
}

impl Client {
    pub async fn connect(peer: SocketAddr) -> Result<Self> {
        Self::connect_with(peer, None).await
    }

    /// Sets `SO_RCVBUF` before connecting, so that it bounds the window from the start. The kernel doubles the value.
    pub async fn connect_with(peer: SocketAddr, rcvbuf: Option<usize>) -> Result<Self> {
        let socket = Socket::new(Domain::for_address(peer), Type::STREAM.nonblocking(), None)?;
        if let Some(bytes) = rcvbuf {
            socket.set_recv_buffer_size(bytes)?;
        }
        let stream = TcpSocket::from_std_stream(socket.into()).connect(peer).await?;
        stream.set_nodelay(true)?;
        Ok(Self::over(stream, peer))
    }

    pub fn local_addr(&self) -> Result<SocketAddr> {
        Ok(self.stream.local_addr()?)
    }

    /// Closes with a reset.
    pub fn reset(self) -> Result<()> {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Uses an existing connection to `peer`.
    pub fn over(stream: S, peer: SocketAddr) -> Self {
        Self {
            stream,
            peer,
            buffer: BytesMut::new(),
            awaited: VecDeque::new(),
            decoder: None,
            wire: 0,
            ended: None,
            recorded: None,
            sent: Instant::now(),
            patience: Duration::from_secs(10),
        }
    }

    /// The connection, and its unread buffered bytes.
    pub fn into_parts(self) -> (S, BytesMut) {
        (self.stream, self.buffer)
    }

    /// Records every byte read from now on, for [`Self::recorded`].
    pub fn record(&mut self) {
        self.recorded = Some(Vec::new());
    }

    /// All bytes read since [`Self::record`], as they were on the wire.
    #[must_use]
    pub fn recorded(&self) -> &[u8] {
        self.recorded.as_deref().unwrap_or_default()
    }

    /// Bytes read that belong to no response yet.
    #[must_use]
    pub fn surplus(&self) -> &[u8] {
        &self.buffer
    }

    /// Sends a request and reads its whole response.
    pub async fn request(&mut self, request: &Request) -> Result<Response> {
        self.send(request).await?;
        self.response().await
    }

    pub async fn send(&mut self, request: &Request) -> Result<()> {
        let wire = request.wire(&self.peer.to_string());
        self.awaited.push_back(request.method == "HEAD");
        match request.pieces {
            None => self.write(&wire).await?,
            Some((bytes, pause)) => {
                for piece in wire.chunks(bytes) {
                    self.write(piece).await?;
                    sleep(pause).await;
                }
            }
        }
        self.sent = Instant::now();
        Ok(())
    }

    /// Writes arbitrary bytes, such as part of a request. A response read afterwards is taken for a GET's.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.write(bytes).await?;
        self.sent = Instant::now();
        Ok(())
    }

    /// A stream may buffer bytes until a flush: TLS does when the socket is full.
    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        Ok(self.stream.flush().await?)
    }

    /// Shuts the sending side down.
    pub async fn finish(&mut self) -> Result<()> {
        Ok(self.stream.shutdown().await?)
    }

    /// Reads the whole next response.
    pub async fn response(&mut self) -> Result<Response> {
        let mut interim = Vec::new();
        let head = loop {
            let head = self.head().await?;
            if head.status >= 200 || head.status == 101 {
                break head;
            }
            interim.push(head);
        };
        let mut body = Vec::new();
        let read = self.read_body(Pace::Fast, |bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        let read = read.await?;
        Ok(Response { interim, head, body, read, sent: self.sent })
    }

    /// Reads the next head, including interim ones. After a final head, [`Self::piece`] or [`Self::read_body`] read the body.
    /// Returns an error if the connection ends first.
    pub async fn head(&mut self) -> Result<Head> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 128];
            let mut parsed = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(len) = parsed.parse(&self.buffer)? {
                let status = parsed.code.unwrap_or_default();
                let reason = parsed.reason.unwrap_or_default().to_owned();
                let owned = |header: &httparse::Header<'_>| {
                    (header.name.to_owned(), String::from_utf8_lossy(header.value).into_owned())
                };
                let headers = parsed.headers.iter().map(owned).collect();
                let raw = self.buffer.split_to(len).freeze();
                let head = Head { status, reason, headers, raw, at: Instant::now() };
                self.wire = 0;
                if status >= 200 {
                    let to_head = self.awaited.pop_front().unwrap_or(false);
                    self.decoder = Some(Decoder::new(head.framed(to_head)?));
                } else if status == 101 {
                    self.awaited.pop_front();
                    self.decoder = Some(Decoder::new(Framed::UntilClose));
                }
                return Ok(head);
            }
            if let Some(end) = self.fill(usize::MAX).await? {
                bail!(
                    "the connection ended ({end:?}) within a head, after {:?}",
                    String::from_utf8_lossy(&self.buffer)
                );
            }
        }
    }

    /// The next payload bytes, from at most `limit` wire bytes, or the end of the body.
    pub async fn piece(&mut self, limit: usize) -> Result<Piece> {
        let decoder = self.decoder.as_mut().context("no head was read for this body")?;
        loop {
            if decoder.complete() {
                return Ok(Piece::End(BodyEnd::Complete));
            }
            let n = self.buffer.len().min(limit);
            if n > 0 {
                let mut data = BytesMut::new();
                let taken = decoder.decode(&self.buffer[..n], |bytes| data.extend_from_slice(bytes))?;
                self.buffer.advance(taken);
                self.wire += taken as u64;
                if !data.is_empty() {
                    return Ok(Piece::Data(data.freeze()));
                }
                continue;
            }
            if self.ended.is_none() {
                let read = read_some(&mut self.stream, &mut self.buffer, self.recorded.as_mut(), limit);
                self.ended = timeout(self.patience, read).await.context("timed out waiting for the body")??;
            }
            match self.ended {
                None => {}
                Some(ConnectionEnd::Reset) => return Ok(Piece::End(BodyEnd::Reset)),
                Some(ConnectionEnd::Fin) if decoder.complete_at_close() => return Ok(Piece::End(BodyEnd::Complete)),
                Some(ConnectionEnd::Fin) => return Ok(Piece::End(BodyEnd::Truncated)),
            }
        }
    }

    /// Reads the rest of the body at `pace` and passes its pieces to `sink`, whose error ends the read.
    pub async fn read_body(&mut self, pace: Pace, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<BodyRead> {
        let mut arrivals = Vec::new();
        let mut len = 0;
        loop {
            let limit = match pace {
                Pace::Fast => usize::MAX,
                Pace::Slow { bytes, .. } => bytes.max(1),
            };
            match self.piece(limit).await? {
                Piece::Data(data) => {
                    arrivals.push(Arrival { at: Instant::now(), len: data.len() });
                    len += data.len() as u64;
                    sink(&data)?;
                }
                Piece::End(end) => {
                    let decoder = self.decoder.take().context("the body has been read")?;
                    let (trailers, chunks) = (decoder.trailers().to_vec(), decoder.chunks());
                    return Ok(BodyRead { end, len, arrivals, trailers, chunks, wire: self.wire });
                }
            }
            if let Pace::Slow { tick, .. } = pace {
                sleep(tick).await;
            }
        }
    }

    /// Reads until the connection ends; the bytes are in [`Self::surplus`] (and in [`Self::recorded`]).
    pub async fn until_end(&mut self) -> Result<ConnectionEnd> {
        loop {
            if let Some(end) = self.fill(usize::MAX).await? {
                return Ok(end);
            }
        }
    }

    async fn fill(&mut self, limit: usize) -> Result<Option<ConnectionEnd>> {
        let read = read_some(&mut self.stream, &mut self.buffer, self.recorded.as_mut(), limit);
        timeout(self.patience, read).await.context("timed out waiting for a byte")?
    }
}

/// Appends what the socket has, at most `limit` bytes, or returns how it ended.
async fn read_some(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    recorded: Option<&mut Vec<u8>>,
    limit: usize,
) -> Result<Option<ConnectionEnd>> {
    let before = buffer.len();
    buffer.reserve(limit.min(64 << 10));
    match stream.take(limit as u64).read_buf(buffer).await {
        Ok(0) => Ok(Some(ConnectionEnd::Fin)),
        Ok(_) => {
            if let Some(recorded) = recorded {
                recorded.extend_from_slice(&buffer[before..]);
            }
            Ok(None)
        }
        // TLS that ends without close_notify was cut.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof
            ) =>
        {
            Ok(Some(ConnectionEnd::Reset))
        }
        Err(error) => Err(error.into()),
    }
}

/// Sends `request` on a new connection and returns every byte until its end, to compare two data paths. The request should ask
/// for `connection: close`.
pub async fn exchange_raw(peer: SocketAddr, request: &[u8]) -> Result<(Vec<u8>, ConnectionEnd)> {
    let mut client = Client::connect(peer).await?;
    client.send_raw(request).await?;
    let end = client.until_end().await?;
    Ok((client.buffer.to_vec(), end))
}

#[cfg(test)]
mod tests {
    use tokio::io::{BufStream, duplex};

    use super::*;

    /// Like TLS with a full socket, the stream buffers writes until it is flushed or full.
    #[tokio::test]
    async fn request_over_buffering_stream_is_sent_whole() {
        let (near, mut far) = duplex(1 << 20);
        let mut client =
            Client::over(BufStream::with_capacity(1 << 16, 1 << 16, near), "127.0.0.1:80".parse().unwrap());
        let whole = Request::post("/", vec![b'x'; 1000]);
        let pieces = whole.clone().piecewise(100, Duration::ZERO);
        for request in [whole, pieces] {
            client.send(&request).await.unwrap();
            let mut wire = vec![0; request.wire("127.0.0.1:80").len()];
            timeout(client.patience, far.read_exact(&mut wire)).await.expect("a byte was held back").unwrap();
            assert!(wire.ends_with(b"xxx"));
        }
        client.send_raw(b"raw").await.unwrap();
        let mut wire = [0; 3];
        timeout(client.patience, far.read_exact(&mut wire)).await.expect("a byte was held back").unwrap();
    }
}
