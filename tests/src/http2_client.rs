//! An exact HTTP/2 client on one connection, plain or TLS, with the request and response types of the HTTP/1.1 client. A body with
//! a length declares it, a chunked body is sent in DATA frames of the chunk size, and a reset stream ends with [`BodyEnd::Reset`].
//! It never retries.
//!
//! It returns a stream's window as the bytes are taken: an unread stream is stalled.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::client::{Arrival, Body, BodyEnd, BodyRead, Head, Piece, Request, Response};

pub struct Http2Client {
    streams: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
    scheme: &'static str,
    authority: String,
    /// Longest wait, after which a call fails. Default: ten seconds.
    pub patience: Duration,
}

impl Drop for Http2Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Http2Client {
    /// With prior knowledge.
    pub async fn connect(peer: SocketAddr) -> Result<Self> {
        Self::connect_with(peer, &mut Builder::new()).await
    }

    /// `settings` sets the windows, among others.
    pub async fn connect_with(peer: SocketAddr, settings: &mut Builder) -> Result<Self> {
        let stream = TcpStream::connect(peer).await?;
        stream.set_nodelay(true)?;
        Self::over(stream, "http", &peer.to_string(), settings).await
    }

    /// Uses an existing connection; requests carry `scheme` and `authority`.
    pub async fn over<S>(stream: S, scheme: &'static str, authority: &str, settings: &mut Builder) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // h2 closes a connection with too many small buffered frames, but these clients stall on purpose.
        settings.enable_push(false).data_frame_budget(1 << 30);
        let (streams, connection) = settings.handshake(stream).await?;
        let connection = tokio::spawn(connection);
        Ok(Self { streams, connection, scheme, authority: authority.to_owned(), patience: Duration::from_secs(10) })
    }

    /// Sends a request and reads its whole response.
    pub async fn request(&mut self, request: &Request) -> Result<Response> {
        self.send(request).await?.response().await
    }

    /// Sends a request: its head now, its body in the background.
    pub async fn send(&mut self, request: &Request) -> Result<Stream> {
        let (pieces, pause) = pieces(request);
        let head = self.head(request)?;
        let mut stream = self.open(head, pieces.is_empty()).await?;
        if let Some(body) = stream.out.take()
            && !pieces.is_empty()
        {
            stream.upload = Some(tokio::spawn(upload(body, pieces, pause)));
        }
        Ok(stream)
    }

    /// Opens a stream with this head; the caller sends the body, unless the head ends the stream.
    pub async fn open(&mut self, head: http::Request<()>, ends: bool) -> Result<Stream> {
        let ready = poll_fn(|context| self.streams.poll_ready(context));
        timeout(self.patience, ready).await.context("timed out waiting for a stream")??;
        let (answer, out) = self.streams.send_request(head, ends)?;
        Ok(Stream {
            answer: Some(answer),
            interim: Vec::new(),
            body: None,
            out: Some(out),
            upload: None,
            sent: Instant::now(),
            frames: 0,
            reason: None,
            patience: self.patience,
        })
    }

    /// The head of a request on the wire. A field named `:authority` becomes the pseudo-header.
    pub fn head(&self, request: &Request) -> Result<http::Request<()>> {
        let authority = request.headers.iter().find(|(name, _)| name == ":authority");
        let authority = authority.map_or(self.authority.as_str(), |(_, value)| value);
        let uri = Uri::builder().scheme(self.scheme).authority(authority).path_and_query(request.target.as_str());
        let mut head = http::Request::builder().method(request.method.as_str()).uri(uri.build()?).body(())?;
        let fields = head.headers_mut();
        for (name, value) in request.headers.iter().filter(|(name, _)| name != ":authority") {
            fields.append(HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_bytes(value.as_bytes())?);
        }
        if let Body::Sized(body) = &request.body {
            fields.insert(http::header::CONTENT_LENGTH, body.len().into());
        }
        Ok(head)
    }

    /// How many concurrent streams the peer allows.
    #[must_use]
    pub fn allowed_streams(&self) -> usize {
        self.streams.current_max_send_streams()
    }

    /// Waits for the end of the connection; an error unless it is orderly.
    pub async fn end(&mut self) -> Result<()> {
        let end = timeout(self.patience, &mut self.connection).await;
        Ok(end.context("timed out waiting for the end of the connection")???)
    }
}

/// The body in the request's pieces, and the pause after each.
fn pieces(request: &Request) -> (Vec<Bytes>, Duration) {
    let (body, size) = match &request.body {
        Body::None => return (Vec::new(), Duration::ZERO),
        Body::Sized(body) => (body, usize::MAX),
        Body::Chunked(body, size) => (body, *size),
    };
    let (size, pause) = request.pieces.unwrap_or((size, Duration::ZERO));
    let mut rest = body.clone();
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        pieces.push(rest.split_to(size.min(rest.len())));
    }
    // An empty body is still a body.
    if pieces.is_empty() {
        pieces.push(Bytes::new());
    }
    (pieces, pause)
}

async fn upload(mut out: SendStream<Bytes>, pieces: Vec<Bytes>, pause: Duration) {
    let last = pieces.len().saturating_sub(1);
    for (number, piece) in pieces.into_iter().enumerate() {
        // The response shows what became of the request.
        if send(&mut out, piece, number == last).await.is_err() {
            return;
        }
        if !pause.is_zero() {
            sleep(pause).await;
        }
    }
}

/// Sends a piece as the peer's window allows.
pub(crate) async fn send(out: &mut SendStream<Bytes>, mut piece: Bytes, ends: bool) -> Result<(), h2::Error> {
    loop {
        if piece.is_empty() {
            return if ends { out.send_data(piece, true) } else { Ok(()) };
        }
        out.reserve_capacity(piece.len());
        let room = match poll_fn(|context| out.poll_capacity(context)).await {
            Some(room) => room?,
            // Reset or ended.
            None => return Err(Reason::STREAM_CLOSED.into()),
        };
        let now = piece.split_to(room.min(piece.len()));
        let last = piece.is_empty();
        out.send_data(now, ends && last)?;
        if last {
            return Ok(());
        }
    }
}

/// A running request. Dropping it cancels the stream.
pub struct Stream {
    answer: Option<ResponseFuture>,
    /// The interim heads so far.
    interim: Vec<Head>,
    body: Option<RecvStream>,
    /// The request's body, if the caller sends it.
    out: Option<SendStream<Bytes>>,
    upload: Option<JoinHandle<()>>,
    sent: Instant,
    frames: u64,
    reason: Option<Reason>,
    pub patience: Duration,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.abort();
        }
    }
}

impl Stream {
    /// Sends more of the request's body.
    pub async fn data(&mut self, piece: impl Into<Bytes>) -> Result<()> {
        let out = self.out.as_mut().context("the client sends this body")?;
        Ok(timeout(self.patience, send(out, piece.into(), false))
            .await
            .context("timed out waiting for the window")??)
    }

    /// Ends the request's body, optionally with trailers.
    pub fn finish(&mut self, trailers: HeaderMap) -> Result<()> {
        let mut out = self.out.take().context("the client sends this body")?;
        if trailers.is_empty() {
            out.send_data(Bytes::new(), true)?;
        } else {
            out.send_trailers(trailers)?;
        }
        self.sent = Instant::now();
        Ok(())
    }

    /// Resets the stream.
    pub fn cancel(self) {}

    /// Why the peer reset the stream, if it did.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.reason
    }

    /// Reads the head; an error if the stream ends first, with the cause in [`Self::reason`].
    pub async fn head(&mut self) -> Result<Head> {
        let mut answer = self.answer.take().context("the head has been read")?;
        let interim = &mut self.interim;
        let answer = async move {
            while let Some(Ok(head)) = poll_fn(|context| answer.poll_informational(context)).await {
                interim.push(received(&head.into_parts().0));
            }
            answer.await
        };
        let answer = timeout(self.patience, answer).await.context("timed out waiting for the head")?;
        let (head, body) = answer.inspect_err(|error| self.reason = reset(error))?.into_parts();
        self.body = Some(body);
        Ok(received(&head))
    }

    /// The next interim head. `None` if the final head comes first.
    pub async fn interim(&mut self) -> Result<Option<Head>> {
        let answer = self.answer.as_mut().context("the head has been read")?;
        let next = poll_fn(|context| answer.poll_informational(context));
        let next = timeout(self.patience, next).await.context("timed out waiting for an interim head")?;
        Ok(next.transpose()?.map(|head| received(&head.into_parts().0)))
    }

    /// The next bytes of the body, at most one DATA frame, or its end.
    pub async fn piece(&mut self) -> Result<Piece> {
        let body = self.body.as_mut().context("no head was read for this body")?;
        loop {
            match timeout(self.patience, body.data()).await.context("timed out waiting for the body")? {
                None => return Ok(Piece::End(BodyEnd::Complete)),
                Some(Ok(data)) => {
                    body.flow_control().release_capacity(data.len())?;
                    if !data.is_empty() {
                        self.frames += 1;
                        return Ok(Piece::Data(data));
                    }
                }
                Some(Err(error)) => return Ok(Piece::End(broken(&mut self.reason, &error))),
            }
        }
    }

    /// Reads the rest of the body and passes its pieces to `sink`, whose error ends the read.
    pub async fn read_body(&mut self, mut sink: impl FnMut(&[u8]) -> Result<()>) -> Result<BodyRead> {
        let (mut arrivals, mut len) = (Vec::new(), 0);
        let mut end = loop {
            match self.piece().await? {
                Piece::Data(data) => {
                    arrivals.push(Arrival { at: Instant::now(), len: data.len() });
                    len += data.len() as u64;
                    sink(&data)?;
                }
                Piece::End(end) => break end,
            }
        };
        let mut trailers = Vec::new();
        if end == BodyEnd::Complete
            && let Some(body) = &mut self.body
        {
            match timeout(self.patience, body.trailers())
                .await
                .context("timed out waiting for the end of the stream")?
            {
                Ok(found) => trailers = found.as_ref().map(pairs).unwrap_or_default(),
                Err(error) => end = broken(&mut self.reason, &error),
            }
        }
        Ok(BodyRead { end, len, arrivals, trailers, chunks: self.frames, wire: len })
    }

    /// Reads the whole response.
    pub async fn response(&mut self) -> Result<Response> {
        let head = self.head().await?;
        let mut body = Vec::new();
        let read = self.read_body(|bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        let read = read.await?;
        Ok(Response { interim: std::mem::take(&mut self.interim), head, body, read, sent: self.sent })
    }
}

fn received(head: &http::response::Parts) -> Head {
    Head {
        status: head.status.as_u16(),
        reason: String::new(),
        headers: pairs(&head.headers),
        raw: Bytes::new(),
        at: Instant::now(),
    }
}

fn reset(error: &h2::Error) -> Option<Reason> {
    error.reason().filter(|_| error.is_reset())
}

fn broken(reason: &mut Option<Reason>, error: &h2::Error) -> BodyEnd {
    *reason = reset(error);
    if reason.is_some() { BodyEnd::Reset } else { BodyEnd::Truncated }
}

/// The fields of a map; values that are not text are shown lossily.
pub(crate) fn pairs(fields: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    fields.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}
