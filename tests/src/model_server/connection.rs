//! One HTTP/1.1 connection: reads requests and writes responses until either side ends it. It owns the socket and is its only
//! writer;
//! `planned` and `openai` produce the responses.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::pacer::Pacer;
use super::plan::{After, Plan};
use super::request::Request;
use super::sent::Tally;
use super::{Shared, openai, planned};

/// Bytes of following requests that are read during a response.
const PIPELINED: usize = 64 << 10;

/// Why a connection ends during a response.
pub(super) enum Stop {
    PeerGone,
    Close,
    Reset,
}

pub(super) struct Connection {
    pub(super) stream: TcpStream,
    pub(super) buffer: BytesMut,
    pacer: Pacer,
    pub(super) shared: Arc<Shared>,
    count: u64,
    /// The response being written, if its request has an id.
    tally: Option<Tally>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, shared: &Arc<Shared>) -> Self {
        // Each write must reach the wire as it is made.
        let _ = stream.set_nodelay(true);
        Self {
            stream,
            buffer: BytesMut::new(),
            pacer: Pacer::default(),
            shared: Arc::clone(shared),
            count: 0,
            tally: None,
        }
    }

    pub(super) async fn serve(mut self) {
        while let Some(request) = self.request().await {
            let shared = Arc::clone(&self.shared);
            if shared.options.keep_requests {
                shared.seen.lock().push(request.echo.clone());
            }
            shared.requests.fetch_add(1, Ordering::Relaxed);
            self.tally = Tally::of(&request.echo).filter(|_| shared.options.keep_sent);
            let responded = self.respond(&request).await;
            self.tally = None;
            match responded {
                Ok(After::KeepAlive) if request.keep_alive => {}
                Ok(_) | Err(Stop::Close) => break,
                Err(Stop::PeerGone) => {
                    shared.aborted.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Err(Stop::Reset) => {
                    let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
                    break;
                }
            }
        }
    }

    /// The next request with its body; `None` at the end of the connection.
    async fn request(&mut self) -> Option<Request> {
        if self.buffer.is_empty() {
            let idle = self.shared.options.idle_close;
            let first = self.stream.read_buf(&mut self.buffer);
            let read = match idle {
                Some(idle) => timeout(idle, first).await.ok()?,
                None => first.await,
            };
            if read.ok()? == 0 {
                return None;
            }
        }
        let request = self.rest_of_request().await;
        if let Err(why) = &request {
            self.shared.uploads_broken.fetch_add(1, Ordering::Relaxed);
            if let Some(why) = why {
                self.shared.malformed.fetch_add(1, Ordering::Relaxed);
                let _ = self.answer(400, "text/plain", why.as_bytes(), After::Close).await;
            }
        }
        request.ok()
    }

    /// On error, returns a text for the peer, or `None` if the peer is gone.
    async fn rest_of_request(&mut self) -> Result<Request, Option<String>> {
        self.count += 1;
        let mut request = loop {
            if let Some((request, len)) = Request::parse(&self.buffer, self.count)? {
                self.buffer.advance(len);
                break request;
            }
            self.read().await?;
        };
        if request.expects_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.map_err(|_| None)?;
        }
        loop {
            let taken = request.feed(&self.buffer)?;
            self.buffer.advance(taken);
            if request.complete() {
                return Ok(request);
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), Option<String>> {
        self.buffer.reserve(16 << 10);
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) | Err(_) => Err(None),
            Ok(_) => Ok(()),
        }
    }

    async fn respond(&mut self, request: &Request) -> Result<After, Stop> {
        if let Some(plan) = request.echo.header("x-test-plan") {
            return match serde_json::from_str::<Plan>(plan) {
                Ok(plan) => planned::respond(self, request, &plan).await,
                Err(error) => self.answer(400, "text/plain", error.to_string().as_bytes(), After::KeepAlive).await,
            };
        }
        match request.path() {
            "/test/body" => planned::respond(self, request, &Plan::default()).await,
            "/test/sent" => self.sent(request).await,
            "/test/echo" => self.json(200, &serde_json::json!(request.echo)).await,
            _ => openai::respond(self, request).await,
        }
    }

    async fn sent(&mut self, request: &Request) -> Result<After, Stop> {
        let id = request.echo.target.split_once('?').map_or("", |(_, id)| id);
        let sent = self.shared.sent.lock().find(id).cloned();
        match sent {
            Some(sent) => self.json(200, &serde_json::json!(sent)).await,
            None => self.answer(404, "text/plain", b"unknown request id", After::KeepAlive).await,
        }
    }

    /// A head up to its own headers, without the final empty line.
    pub(super) fn head(&self, status: u16) -> String {
        let reason = http::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason()).unwrap_or("");
        let (addr, count) = (self.shared.addr, self.count);
        format!("HTTP/1.1 {status} {reason}\r\nx-served-by: {addr}\r\nx-request-count: {count}\r\n")
    }

    /// Sends a whole response in one write.
    pub(super) async fn answer(
        &mut self,
        status: u16,
        content_type: &str,
        body: &[u8],
        after: After,
    ) -> Result<After, Stop> {
        let mut head = self.head(status);
        let _ = write!(head, "content-type: {content_type}\r\ncontent-length: {}\r\n", body.len());
        if after == After::Close {
            head.push_str("connection: close\r\n");
        }
        head.push_str("\r\n");
        let mut wire = head.into_bytes();
        wire.extend_from_slice(body);
        self.write(&wire).await?;
        Ok(after)
    }

    pub(super) async fn json(&mut self, status: u16, body: &serde_json::Value) -> Result<After, Stop> {
        self.answer(status, "application/json", body.to_string().as_bytes(), After::KeepAlive).await
    }

    /// One write, unless the socket has too little room.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        if let Some(tally) = &mut self.tally {
            tally.writing(bytes, &mut self.shared.sent.lock());
        }
        self.stream.write_all(bytes).await.map_err(|_| Stop::PeerGone)?;
        self.shared.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// From now on, only full segments are sent.
    pub(super) fn cork(&self) {
        let _ = socket2::SockRef::from(&self.stream).set_tcp_cork(true);
    }

    /// Waits, forever without a duration, and notices a departing peer.
    pub(super) async fn pause(&mut self, duration: Option<Duration>) -> Result<(), Stop> {
        let Self { stream, buffer, pacer, .. } = self;
        let wait = async {
            match duration {
                Some(duration) => pacer.sleep(duration).await,
                None => std::future::pending().await,
            }
        };
        unless_gone(stream, buffer, wait).await
    }

    /// Waits until the server is told to continue, and notices a departing peer.
    pub(super) async fn until_told(&mut self) -> Result<(), Stop> {
        let Self { stream, buffer, shared, .. } = self;
        let mut told = shared.told.subscribe();
        let wait = async {
            // Fails when the server stops, which also ends its connections.
            let _ = told.wait_for(|told| *told).await;
        };
        unless_gone(stream, buffer, wait).await
    }
}

async fn unless_gone(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    wait: impl Future<Output = ()>,
) -> Result<(), Stop> {
    let leave = async {
        while buffer.len() < PIPELINED {
            if !matches!(stream.read_buf(buffer).await, Ok(1..)) {
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        () = leave => Err(Stop::PeerGone),
        () = wait => Ok(()),
    }
}
