//! Serves a client's connection: one request after the other, until one side ends it. A connection that begins with the
//! HTTP/2 preface is handed to `http2`.

mod age;
mod announced;
mod http2;

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::BytesMut;
use http::{HeaderMap, Method};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use self::{age::ConnectionAge, announced::announced};
use crate::{
    client::{Client, ClientIo, ClientSocket, close::Linger},
    config::Config,
    deadline::{self, with_deadline},
    error::Error,
    http::{
        head::HeadLimits,
        request::{RequestError, RequestHead, RequestParser},
    },
    kernel::socket,
    proxy::{self, AfterRequest, Origin, Panicked, RefusedHead},
    room::IdleState,
    tls::{self, Acceptor, identity::ClientIdentity},
    worker::{Current, Worker},
};

/// Size of the first read of a connection, in bytes; larger heads grow the buffer up to the configured limit.
const FIRST_READ: usize = 4096;

/// How long a draining agent waits for the first request of a connection.
const FIRST_REQUEST: Duration = Duration::from_millis(200);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
struct ClientPeer {
    address: SocketAddr,
    /// By its certificate.
    identity: Option<Arc<ClientIdentity>>,
}

impl ClientPeer {
    /// A request of it that begins now.
    fn origin(&self, begun: Instant, last_at: Option<Instant>) -> Origin {
        Origin { client: self.address, identity: self.identity.clone(), begun, last_at }
    }
}

/// Serves the connection to its end. `announces`: it begins with a PROXY header.
pub async fn serve(current: &Rc<Current>, mut stream: TcpStream, peer: SocketAddr, announces: bool) {
    probe(current, &stream);
    let Some(address) = origin(current, &mut stream, peer, announces).await else { return };
    // Fails only if the client has already closed.
    let Ok(socket) = ClientSocket::new(stream) else { return };
    requests(current, socket, ClientPeer { address, identity: None }).await;
}

/// The address that the connection comes from. `None` if it has to be closed.
async fn origin(current: &Current, stream: &mut TcpStream, peer: SocketAddr, announces: bool) -> Option<SocketAddr> {
    if announces { announced(current, stream, peer).await } else { Some(peer) }
}

/// Has the kernel detect a client that disappears while the connection is idle or its window is closed.
fn probe(current: &Current, stream: &TcpStream) {
    let after = current.worker().shared.config.timeouts.client_unreachable;
    // Fails only if the client has already closed, which the next read detects.
    let _ = socket::probe_when_idle(stream, after);
    // Fails on kernels before 6.15, which detect it later.
    let _ = socket::probe_often(stream, after);
}

/// Like [`serve`], for a client that speaks TLS. The handshake has the time limit of a request head. It takes a
/// handshake place from the client's first byte on, and its steps take turns with other handshakes of the worker.
pub async fn serve_tls(
    current: &Rc<Current>,
    tls: &Acceptor,
    mut stream: TcpStream,
    peer: SocketAddr,
    announces: bool,
) {
    probe(current, &stream);
    let Some(address) = origin(current, &mut stream, peer, announces).await else { return };
    let stream = match handshake(&current.worker(), tls, stream, address).await {
        Ok(Some(stream)) => stream,
        Ok(None) => return,
        Err(reason) => return current.worker().shared.metrics.tls_handshake_failed(reason),
    };
    let session = stream.get_ref().1;
    let certificate = session.peer_certificates().and_then(<[_]>::first);
    let peer = ClientPeer { address, identity: certificate.and_then(ClientIdentity::of).map(Arc::new) };
    if session.alpn_protocol() == Some(tls::H2) {
        return http2::serve(current, BytesMut::new(), ClientIo::Tls(Box::new(stream)), Instant::now(), peer).await;
    }
    let Ok(socket) = ClientSocket::tls(stream) else { return };
    requests(current, socket, peer).await;
}

/// Returns `None` if the client has already closed. The error is the metric's label.
async fn handshake(
    worker: &Worker,
    tls: &Acceptor,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<Option<TlsStream<TcpStream>>, &'static str> {
    let Ok(()) = stream.set_nodelay(true) else { return Ok(None) };
    let until = deadline::after(worker.shared.config.timeouts.head);
    if with_deadline(until, stream.peek(&mut [0])).await.is_none() {
        return Err("timeout");
    }
    let Some(_place) = with_deadline(until, tls.place()).await else { return Err("busy") };
    let _in_progress = worker.shared.metrics.tls_handshake();
    match with_deadline(until, worker.handshakes.take(tls.accept(stream))).await {
        Some(Ok(stream)) => Ok(Some(stream)),
        Some(Err(error)) => {
            tracing::debug!(%peer, %error, "TLS handshake failed");
            Err("refused")
        }
        None => Err("timeout"),
    }
}

/// Serves HTTP/1.1 requests, one after the other.
async fn requests(current: &Rc<Current>, mut socket: ClientSocket, peer: ClientPeer) {
    let mut first = !socket.is_tls();
    let mut lease = None;
    let idle_state = IdleState::new(&current.idle);
    let age = ConnectionAge::since(Instant::now());
    loop {
        let mut begun = None;
        let mut worker = current.worker();
        let head = read_head(current, &mut worker, &mut socket, &idle_state, &mut begun).await;
        let last_at = age.ends(&worker.shared.config);
        let origin = peer.origin(begun.unwrap_or_else(Instant::now), last_at);
        // Whatever the result, the connection no longer waits for a request.
        idle_state.set_busy();
        let http2 = worker.shared.config.listen.http2_max_streams > 0;
        if std::mem::take(&mut first) && http2 && matches!(head, Err(Error::Request(RequestError::Http2Preface))) {
            drop(worker);
            let (wire, read) = socket.into_parts();
            return http2::serve(current, read, wire, origin.begun, peer).await;
        }
        let refused = head.is_err().then(|| refused(&socket.buf));
        let mut client = Client::Http1(socket);
        let after = match head {
            Ok(Some(head)) => {
                let answered = proxy::guarded(&worker, &mut client, head, origin, &mut lease).await;
                answered.unwrap_or_else(|Panicked(after)| after)
            }
            Ok(None) if idle_state.is_shed() => AfterRequest::Abort,
            Ok(None) => AfterRequest::Close,
            Err(error) => {
                proxy::refuse(&worker, &mut client, &error, refused.unwrap_or_default(), origin).await;
                AfterRequest::Close
            }
        };
        let Client::Http1(back) = client else { return };
        socket = back;
        if socket.has_stalled() {
            worker.shared.metrics.client_stalled();
        }
        let after = match after {
            AfterRequest::Pinned(pin) => {
                drop(worker);
                let after = proxy::pinned(current, &mut socket, *pin, peer.address).await;
                worker = current.worker();
                after
            }
            after => after,
        };
        match after {
            AfterRequest::Next if !worker.shared.draining.is_cancelled() => {}
            AfterRequest::Next | AfterRequest::Close | AfterRequest::Pinned(_) => {
                if last_at.is_some_and(|at| at <= Instant::now()) {
                    worker.shared.metrics.client_aged();
                }
                return close(&worker, socket).await;
            }
            AfterRequest::Abort => return abort(&worker, socket).await,
        }
    }
}

async fn abort(worker: &Worker, socket: ClientSocket) {
    tokio::select! {
        () = worker.shared.force.cancelled() => {}
        () = socket.abort() => {}
    }
}

async fn close(worker: &Worker, socket: ClientSocket) {
    let linger = Linger::new(&worker.shared.config, socket.unread);
    if let Err(cut) = socket.close(linger).await {
        worker.shared.metrics.client_linger_cut(cut);
    }
}

/// How long a request head may take. It counts as part of the request.
fn head_limit(config: &Config) -> Option<Duration> {
    config.timeouts.head.into_iter().chain(config.timeouts.request).min()
}

/// Reads the next request head; `begun` is set at its first byte. Returns `None` if the client closed or was idle for too long, or
/// if no request has begun and the agent drains or the connection is shed. `worker` is set to the current one until the request
/// begins.
async fn read_head(
    current: &Current,
    worker: &mut Rc<Worker>,
    client: &mut ClientSocket,
    idle_state: &IdleState,
    begun: &mut Option<Instant>,
) -> Result<Option<RequestHead>, Error> {
    *begun = has_begun(&client.buf).then(Instant::now);
    let idle_since = Instant::now();
    let mut parser = RequestParser::default();
    loop {
        if begun.is_none() {
            *worker = current.worker();
        }
        let config = &worker.shared.config;
        let (limits, head_limit) = (HeadLimits::of(&config.limits), head_limit(config));
        if let Some((head, length)) = parser.parse(&client.buf, &limits)? {
            let _ = client.buf.split_to(length);
            return Ok(Some(head));
        }
        if begun.is_none() {
            idle_state.set_idle();
        } else {
            idle_state.set_busy();
        }
        let idle_until = || config.timeouts.keep_alive.map(|limit| idle_since + limit);
        let until = begun.map_or_else(idle_until, |begun| head_limit.map(|limit| begun + limit));
        let read = tokio::select! {
            biased;
            read = with_deadline(until, client.read(FIRST_READ)) => read,
            () = current.replaced(), if begun.is_none() => continue,
            () = drained(worker, idle_state), if begun.is_none() => {
                // Bytes already in the socket were sent before the drain.
                match client.read_now(FIRST_READ) {
                    Ok(n) if n > 0 => Some(Ok(n)),
                    _ => return Ok(None),
                }
            }
            () = idle_state.shed(), if begun.is_none() => match client.read_now(FIRST_READ) {
                Ok(n) if n > 0 => Some(Ok(n)),
                _ => {
                    worker.shared.metrics.client_shed();
                    idle_state.mark_shed();
                    return Ok(None);
                }
            },
        };
        match read {
            None if begun.is_some() => return Err(Error::HeadTimeout(head_limit.unwrap_or_default())),
            Some(Ok(0)) if begun.is_some() => return Err(Error::HeadCut),
            Some(Err(_)) if begun.is_some() => return Err(Error::ClientGone),
            None => {
                worker.shared.metrics.client_idle_closed();
                return Ok(None);
            }
            Some(Ok(0) | Err(_)) => return Ok(None),
            Some(Ok(_)) => *begun = begun.or_else(|| has_begun(&client.buf).then(Instant::now)),
        }
    }
}

/// Resolves when the agent drains; for an unused connection slightly later, because its first request may be in
/// transit.
async fn drained(worker: &Worker, idle_state: &IdleState) {
    worker.shared.draining.cancelled().await;
    if !idle_state.is_used() {
        tokio::time::sleep(FIRST_REQUEST).await;
    }
}

/// What the request line of a refused head says, as far as it was read.
fn refused(buf: &[u8]) -> RefusedHead {
    let line = buf.split(|&byte| byte == b'\r' || byte == b'\n').find(|line| !line.is_empty()).unwrap_or_default();
    let mut words = line.split(|&byte| byte == b' ');
    let method = words.next().and_then(|method| Method::from_bytes(method).ok()).unwrap_or_default();
    let path = String::from_utf8_lossy(words.next().unwrap_or_default()).into_owned();
    RefusedHead { method, path, headers: HeaderMap::new() }
}

/// Empty lines before a request (RFC 9112 §2.2) do not begin it: some clients end a body with one and then wait.
fn has_begun(buf: &[u8]) -> bool {
    buf.iter().any(|&byte| byte != b'\r' && byte != b'\n')
}
