//! HTTP/2 connections to endpoints without TLS (`app_protocol = "h2c"`), shared by the requests of a worker. Needs its `LocalSet`.
//!
//! A stream uses a connection that is below the endpoint's own limit of streams. If none is, one connection at a time is made per
//! endpoint, and all requests that wait for it succeed or fail together. No PINGs are sent, because gRPC servers close connections
//! that ping more often than every five minutes; TCP detects an unreachable machine ([`socket::detect_unreachable`]).

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{FutureExt as _, LocalBoxFuture, Shared};
use h2::{
    RecvStream, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use tokio::{net::TcpSocket, sync::watch, time::Instant};

use super::{
    local_fault::connect_error,
    timeouts::ConnectionTimeouts,
    wire::{EndpointIo, Link},
};
use crate::{
    deadline::{self, with_deadline},
    http::{frame_heads::MAX_FRAME_ERRORS, head::HeadLimits, trailers},
    kernel::socket,
};

/// Most connections to one endpoint. Beyond that, requests queue for a stream.
const MAX_CONNECTIONS: usize = 64;
/// Flow-control window of a stream: the bytes of a response that a client which reads nothing holds in memory.
const STREAM_WINDOW: u32 = 128 << 10;
/// Large enough never to be the limit: streams whose clients read nothing must not block the others. Also, h2 closes a connection
/// when the small frames that wait on it, at 256 bytes each, reach half of this.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Bytes of a request's body that are buffered beyond the endpoint's window.
const SEND_BUFFER: usize = 64 << 10;

/// Streams that h2 remembers for a second after their reset: the clients of many streams may leave at the same time. Late frames of
/// others are answered with another reset.
const RESET_STREAMS: usize = 4096;

/// A worker's HTTP/2 connections to endpoints. Clones share them.
#[derive(Clone)]
pub struct Http2Pool(Rc<Http2PoolInner>);

struct Http2PoolInner {
    endpoints: RefCell<HashMap<SocketAddr, EndpointConnections>>,
    times: Cell<ConnectionTimeouts>,
    heads: Cell<HeadLimits>,
}

#[derive(Default)]
struct EndpointConnections {
    connections: Vec<Http2Connection>,
    /// The connection that is being made.
    dialling: Option<Dial>,
}

type Dial = Shared<LocalBoxFuture<'static, Result<Http2Connection, Arc<io::Error>>>>;

#[derive(Clone)]
struct Http2Connection {
    send: SendRequest<Bytes>,
    /// The endpoint's limit of concurrent streams; 0 until it has sent its settings.
    limit: watch::Receiver<usize>,
    load: Rc<Load>,
    link: Rc<Link>,
}

struct Load {
    streams: Cell<usize>,
    used: Cell<bool>,
    idle_since: Cell<Instant>,
}

/// One stream of a connection. Dropping it frees the stream.
pub struct Http2Stream {
    send: SendRequest<Bytes>,
    /// Whether the connection has carried requests before.
    pub reused: bool,
    load: Rc<Load>,
    link: Rc<Link>,
}

impl Http2Stream {
    /// Sends the request's head. The body follows, unless the head `ends` the request.
    pub fn open(
        &mut self,
        head: http::Request<()>,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>, RequestAccount), h2::Error> {
        let (response, out) = self.send.send_request(head, ends)?;
        let account = RequestAccount::open(Rc::clone(&self.link), out.stream_id().as_u32());
        Ok((response, out, account))
    }

    /// Reads the trailers after the end of the stream's body. An error if they are too large. Cancel-safe.
    pub async fn trailers(&self, body: &mut RecvStream) -> io::Result<http::HeaderMap> {
        let trailers = body.trailers().await.map_err(io::Error::other)?.unwrap_or_default();
        let incomplete = self.link.lacks_fields(body.stream_id().as_u32());
        trailers::check(&trailers, incomplete).map_err(io::Error::other)?;
        Ok(trailers)
    }

    /// Bytes of the whole connection that the endpoint's kernel has acknowledged. Returns `None` if that is unknown.
    pub fn acknowledged(&self) -> Option<u64> {
        self.link.acknowledged()
    }

    /// After the connection has ended: whether the endpoint's kernel has acknowledged more than `before` bytes. Returns `None` if
    /// that is unknown.
    pub async fn acknowledged_more(&self, before: Option<u64>) -> Option<bool> {
        self.link.acknowledged_more(before?).await
    }
}

/// How far the endpoint's kernel has acknowledged the request of one stream.
pub struct RequestAccount {
    link: Rc<Link>,
    stream: u32,
    /// Bytes of the body that h2 has been given.
    given: Cell<u64>,
}

impl RequestAccount {
    /// None of the request may have been written.
    fn open(link: Rc<Link>, stream: u32) -> Self {
        link.written().borrow_mut().open(stream);
        Self { link, stream, given: Cell::new(0) }
    }

    /// Records that h2 is given this many more bytes of the body.
    pub fn give(&self, bytes: usize) {
        self.given.set(self.given.get() + bytes as u64);
    }

    /// A number that grows with each acknowledged byte of the connection that the request, as far as h2 has it, waits for. At first it
    /// is [`Http2Stream::acknowledged`]. Returns `None` if it is unknown.
    pub fn acknowledged(&self) -> Option<u64> {
        let acknowledged = self.link.acknowledged()?;
        Some(self.link.written().borrow().reached(self.stream, self.given.get(), acknowledged))
    }
}

impl Drop for RequestAccount {
    fn drop(&mut self) {
        self.link.written().borrow_mut().close(self.stream);
    }
}

/// Reads the next bytes of a body. Returns `None` at its end. Cancel-safe.
///
/// RST_STREAM with NO_ERROR after a complete response only ends the request (RFC 9113 §8.1), and h2 does not report it. Before the
/// end of the response it is an error like any other.
pub async fn data(body: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    let data = body.data().await.transpose()?;
    if let Some(data) = &data {
        body.flow_control().release_capacity(data.len())?;
    }
    Ok(data)
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        self.load.streams.set(self.load.streams.get() - 1);
        self.load.idle_since.set(Instant::now());
    }
}

impl Http2Pool {
    /// An empty pool.
    pub fn new(times: ConnectionTimeouts, heads: HeadLimits) -> Self {
        let (times, heads) = (Cell::new(times), Cell::new(heads));
        Self(Rc::new(Http2PoolInner { endpoints: RefCell::default(), times, heads }))
    }

    /// Sets the timeouts and limits of new connections.
    pub fn set(&self, times: ConnectionTimeouts, heads: HeadLimits) {
        self.0.times.set(times);
        self.0.heads.set(heads);
    }

    /// Returns a stream for a request, within the limit for connecting. The error kinds are those of `connect(2)` and `TimedOut`. An
    /// endpoint that ends a new connection, as one that drains does, counts as one that does not accept it. Cancel-safe.
    pub async fn stream(&self, address: SocketAddr) -> io::Result<Http2Stream> {
        let limit = deadline::after(self.0.times.get().connect);
        with_deadline(limit, self.connected(address)).await.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn connected(&self, address: SocketAddr) -> io::Result<Http2Stream> {
        loop {
            let dial = {
                let mut endpoints = self.0.endpoints.borrow_mut();
                let endpoint = endpoints.entry(address).or_default();
                if let Some(stream) = endpoint.stream() {
                    return Ok(stream);
                }
                endpoint.dialling.get_or_insert_with(|| self.dial(address)).clone()
            };
            let connection = dial.await.map_err(|error| io::Error::new(error.kind(), error))?;
            if connection.is_closed() {
                return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the endpoint closed a new connection"));
            }
        }
    }

    /// Connects in a separate task, which continues even if every waiting request is cancelled.
    fn dial(&self, address: SocketAddr) -> Dial {
        let task = tokio::task::spawn_local(Rc::clone(&self.0).dial(address));
        async move { task.await.unwrap_or_else(|error| Err(Arc::new(io::Error::other(error)))) }.boxed_local().shared()
    }

    /// Closes connections without streams that were idle for too long or whose endpoint is no longer `wanted`.
    pub fn sweep(&self, keep_alive: Duration, wanted: impl Fn(SocketAddr) -> bool) {
        self.0.endpoints.borrow_mut().retain(|&address, endpoint| {
            let wanted = wanted(address);
            endpoint.connections.retain(|connection| {
                let busy = connection.load.streams.get() > 0;
                !connection.is_closed() && (busy || (wanted && connection.load.idle_since.get().elapsed() < keep_alive))
            });
            !endpoint.connections.is_empty() || endpoint.dialling.is_some()
        });
    }
}

impl Http2Connection {
    /// Whether the connection has ended or the endpoint has sent GOAWAY.
    fn is_closed(&self) -> bool {
        let mut noop = Context::from_waker(Waker::noop());
        matches!(self.send.clone().poll_ready(&mut noop), Poll::Ready(Err(_)))
    }
}

impl EndpointConnections {
    fn stream(&mut self) -> Option<Http2Stream> {
        self.connections.retain(|connection| !connection.is_closed());
        let room = |connection: &&Http2Connection| connection.load.streams.get() < *connection.limit.borrow();
        let connection = match self.connections.iter().find(room) {
            Some(connection) => connection,
            None if self.connections.len() < MAX_CONNECTIONS => return None,
            None => self.connections.iter().min_by_key(|connection| connection.load.streams.get())?,
        };
        connection.load.streams.set(connection.load.streams.get() + 1);
        let reused = connection.load.used.replace(true);
        let (load, link) = (Rc::clone(&connection.load), Rc::clone(&connection.link));
        Some(Http2Stream { send: connection.send.clone(), reused, load, link })
    }
}

impl Http2PoolInner {
    async fn dial(self: Rc<Self>, address: SocketAddr) -> Result<Http2Connection, Arc<io::Error>> {
        let times = self.times.get();
        let connection = with_deadline(deadline::after(times.connect), connect(address, times, self.heads.get())).await;
        let connection = connection.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
        let mut endpoints = self.endpoints.borrow_mut();
        let endpoint = endpoints.entry(address).or_default();
        endpoint.dialling = None;
        let connection = connection.map_err(Arc::new)?;
        endpoint.connections.push(connection.clone());
        Ok(connection)
    }
}

/// Connects, and waits for the endpoint's limit of streams.
async fn connect(address: SocketAddr, times: ConnectionTimeouts, heads: HeadLimits) -> io::Result<Http2Connection> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket::detect_unreachable(&socket, times.unreachable)?;
    let tcp = socket.connect(address).await.map_err(|error| connect_error(error, address))?;
    tcp.set_nodelay(true)?;
    let (wire, link) = EndpointIo::new(tcp, heads.header_block());
    let (send, connection) = Builder::new()
        .enable_push(false)
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(heads.header_list())
        .max_concurrent_reset_streams(RESET_STREAMS)
        // The connection carries other requests than those whose responses are wrong or late.
        .max_local_error_reset_streams(Some(MAX_FRAME_ERRORS))
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(wire)
        .await
        .map_err(io::Error::other)?;
    let (limit_sender, mut limit) = watch::channel(0);
    tokio::task::spawn_local(async move {
        let mut connection = pin!(connection);
        let ended = std::future::poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            let now = connection.max_concurrent_send_streams();
            limit_sender.send_if_modified(|limit| std::mem::replace(limit, now) != now);
            ended
        });
        if let Err(error) = ended.await {
            tracing::debug!(%address, %error, "HTTP/2 connection to an endpoint ended");
        }
    });
    limit.wait_for(|&limit| limit > 0).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset))?;
    let load = Load { streams: Cell::new(0), used: Cell::new(false), idle_since: Cell::new(Instant::now()) };
    Ok(Http2Connection { send, limit, load: Rc::new(load), link })
}

#[cfg(test)]
mod tests;
