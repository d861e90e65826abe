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
    time::Duration,
};

use futures_util::future::{FutureExt as _, LocalBoxFuture, Shared};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpSocket, sync::watch, time::Instant};

use super::{
    times::Times,
    wire::{Link, Wire},
};
use crate::{executor::LocalExecutor, http::frames::FrameBody, kernel::socket};

/// Most connections to one endpoint. Beyond that, requests queue for a stream.
const MAX_CONNECTIONS: usize = 64;
/// Flow-control window of a stream: the bytes of a response that a client which reads nothing holds in memory.
const STREAM_WINDOW: u32 = 128 << 10;
/// Large enough never to be the limit: streams whose clients read nothing must not block the others. Also, h2 closes a connection
/// when the small frames that wait on it, at 256 bytes each, reach half of this.
const CONNECTION_WINDOW: u32 = 1 << 30;
/// Bytes of a request's body that are buffered beyond the endpoint's window.
const SEND_BUFFER: usize = 64 << 10;
/// How often a new connection is polled for the endpoint's settings: hyper reads them in a task that wakes nobody.
const SETTINGS_POLL: Duration = Duration::from_millis(1);

#[derive(Clone)]
pub struct Http2Pool(Rc<Inner>);

struct Inner {
    endpoints: RefCell<HashMap<SocketAddr, Endpoint>>,
    times: Cell<Times>,
}

#[derive(Default)]
struct Endpoint {
    connections: Vec<Connection>,
    /// The connection that is being made.
    dialling: Option<Dial>,
}

type Dial = Shared<LocalBoxFuture<'static, Result<(), Arc<io::Error>>>>;

struct Connection {
    send: SendRequest<FrameBody>,
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
pub struct Stream {
    pub send: SendRequest<FrameBody>,
    /// Whether the connection has carried requests before.
    pub reused: bool,
    load: Rc<Load>,
    link: Rc<Link>,
}

impl Stream {
    /// Bytes of the whole connection that the endpoint's kernel has acknowledged. Returns `None` if that is unknown.
    pub fn acknowledged(&self) -> Option<u64> {
        self.link.acknowledged()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.load.streams.set(self.load.streams.get() - 1);
        self.load.idle_since.set(Instant::now());
    }
}

impl Http2Pool {
    pub fn new(times: Times) -> Self {
        Self(Rc::new(Inner { endpoints: RefCell::default(), times: Cell::new(times) }))
    }

    pub fn set_times(&self, times: Times) {
        self.0.times.set(times);
    }

    /// Returns a stream for a request. The error kinds are those of `connect(2)` and `TimedOut`. Cancel-safe.
    pub async fn stream(&self, address: SocketAddr) -> io::Result<Stream> {
        loop {
            let dial = {
                let mut endpoints = self.0.endpoints.borrow_mut();
                let endpoint = endpoints.entry(address).or_default();
                if let Some(stream) = endpoint.stream() {
                    return Ok(stream);
                }
                endpoint.dialling.get_or_insert_with(|| self.dial(address)).clone()
            };
            dial.await.map_err(|error| io::Error::new(error.kind(), error))?;
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
                !connection.send.is_closed()
                    && (busy || (wanted && connection.load.idle_since.get().elapsed() < keep_alive))
            });
            !endpoint.connections.is_empty() || endpoint.dialling.is_some()
        });
    }
}

impl Endpoint {
    fn stream(&mut self) -> Option<Stream> {
        self.connections.retain(|connection| !connection.send.is_closed());
        let room = |connection: &&Connection| connection.load.streams.get() < *connection.limit.borrow();
        let connection = match self.connections.iter().find(room) {
            Some(connection) => connection,
            None if self.connections.len() < MAX_CONNECTIONS => return None,
            None => self.connections.iter().min_by_key(|connection| connection.load.streams.get())?,
        };
        connection.load.streams.set(connection.load.streams.get() + 1);
        let reused = connection.load.used.replace(true);
        let (load, link) = (Rc::clone(&connection.load), Rc::clone(&connection.link));
        Some(Stream { send: connection.send.clone(), reused, load, link })
    }
}

impl Inner {
    async fn dial(self: Rc<Self>, address: SocketAddr) -> Result<(), Arc<io::Error>> {
        let times = self.times.get();
        let connection = match times.connect {
            Some(limit) => {
                let dialled = tokio::time::timeout(limit, connect(address, times)).await;
                dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            }
            None => connect(address, times).await,
        };
        let mut endpoints = self.endpoints.borrow_mut();
        let endpoint = endpoints.entry(address).or_default();
        endpoint.dialling = None;
        endpoint.connections.push(connection.map_err(Arc::new)?);
        Ok(())
    }
}

/// Connects, and waits for the endpoint's limit of streams.
async fn connect(address: SocketAddr, times: Times) -> io::Result<Connection> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket::detect_unreachable(&socket, times.unreachable)?;
    let tcp = socket.connect(address).await?;
    tcp.set_nodelay(true)?;
    let (wire, link) = Wire::new(tcp);
    let (send, connection) = Builder::new(LocalExecutor)
        .timer(TokioTimer::new())
        .initial_max_send_streams(0)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .handshake(TokioIo::new(wire))
        .await
        .map_err(io::Error::other)?;
    let (told, mut limit) = watch::channel(0);
    tokio::task::spawn_local(async move {
        let mut connection = pin!(connection);
        let mut look = tokio::time::interval(SETTINGS_POLL);
        let ended = std::future::poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            let now = connection.current_max_send_streams();
            told.send_if_modified(|limit| std::mem::replace(limit, now) != now);
            while now == 0 && ended.is_pending() && look.poll_tick(cx).is_ready() {}
            ended
        });
        if let Err(error) = ended.await {
            tracing::debug!(%address, %error, "HTTP/2 connection to an endpoint ended");
        }
    });
    limit.wait_for(|&limit| limit > 0).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset))?;
    let load = Load { streams: Cell::new(0), used: Cell::new(false), idle_since: Cell::new(Instant::now()) };
    Ok(Connection { send, limit, load: Rc::new(load), link })
}

#[cfg(test)]
mod tests;
