//! A client's connection: one request after the other, until one side has enough. One that begins as HTTP/2 does is
//! handed to `http2`.

mod http2;

use std::{net::SocketAddr, rc::Rc, time::Duration};

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::{
    client::{Client, ClientSocket, Wire, close::Linger},
    error::Error,
    http::{
        head::HeadLimits,
        request::{RequestError, RequestHead, RequestParser},
    },
    kernel::socket,
    proxy::{self, After, Panicked},
    room::Resting,
    tls::{self, Acceptor},
    worker::{Current, Worker},
};

/// First read of a connection; larger heads grow the buffer up to the configured limit.
const READ: usize = 4096;

/// How long the first request of a connection is waited for when the agent drains.
const FIRST: Duration = Duration::from_millis(200);

/// Serves the connection to its end.
pub async fn serve(current: &Rc<Current>, stream: TcpStream, peer: SocketAddr) {
    probe(current, &stream);
    // Fails only when the client has left already.
    let Ok(socket) = ClientSocket::new(stream) else { return };
    requests(current, socket, peer).await;
}

/// Has the kernel find out whether the client's machine is there while nothing is said.
fn probe(current: &Current, stream: &TcpStream) {
    // Fails only when the client has left already, which the next read finds.
    let _ = socket::probe_when_idle(stream, current.worker().shared.config.timeouts.client_unreachable);
}

/// As [`serve`], of a client that speaks TLS. The handshake has the time of a request head; it takes a place among all handshakes
/// from the client's first byte on, and its steps take turns with those of the same worker.
pub async fn serve_tls(current: &Rc<Current>, tls: &Acceptor, stream: TcpStream, peer: SocketAddr) {
    probe(current, &stream);
    let worker = current.worker();
    // Fails only when the client has left already.
    let Ok(()) = stream.set_nodelay(true) else { return };
    let until = worker.shared.config.timeouts.head.map(|limit| Instant::now() + limit);
    let failed = |reason| worker.shared.metrics.tls_handshake_failed(reason);
    if within(until, stream.peek(&mut [0])).await.is_none() {
        return failed("timeout");
    }
    let Some(place) = within(until, tls.place()).await else { return failed("busy") };
    let under_way = worker.shared.metrics.tls_handshake();
    let stream = match within(until, worker.handshakes.take(tls.accept(stream))).await {
        Some(Ok(stream)) => stream,
        Some(Err(error)) => {
            tracing::debug!(%peer, %error, "TLS handshake");
            return failed("refused");
        }
        None => return failed("timeout"),
    };
    drop((place, under_way));
    if stream.get_ref().1.alpn_protocol() == Some(tls::H2) {
        return http2::serve(current, BytesMut::new(), Wire::Tls(Box::new(stream)), peer).await;
    }
    let Ok(socket) = ClientSocket::tls(stream) else { return };
    requests(current, socket, peer).await;
}

/// Requests of HTTP/1.1, one after the other.
async fn requests(current: &Rc<Current>, mut socket: ClientSocket, peer: SocketAddr) {
    let mut first = !socket.is_tls();
    let mut lease = None;
    let resting = Resting::new(&current.idle);
    loop {
        let head = read_head(&current.worker(), &mut socket, &resting).await;
        // A reload may have come while nothing did.
        let worker = &current.worker();
        let http2 = worker.shared.config.listen.http2_max_streams > 0;
        if std::mem::take(&mut first) && http2 && matches!(head, Err(Error::Request(RequestError::Http2Preface))) {
            let (wire, read) = socket.into_parts();
            return http2::serve(current, read, wire, peer).await;
        }
        let path = if head.is_err() { path(&socket.buf) } else { String::new() };
        let mut client = Client::Http1(socket);
        let after = match head {
            Ok(Some((head, begun))) => {
                let answered = proxy::guarded(worker, &mut client, head, begun, peer, &mut lease).await;
                answered.unwrap_or_else(|Panicked(after)| after)
            }
            Ok(None) if resting.is_over() => After::Abort,
            Ok(None) => After::Close,
            Err(error) => {
                proxy::refuse(worker, &mut client, &error, &path).await;
                After::Close
            }
        };
        let Client::Http1(back) = client else { return };
        socket = back;
        if socket.has_stalled() {
            worker.shared.metrics.client_stalled();
        }
        let after = match after {
            After::Pinned(pin) => proxy::pinned(current, &mut socket, *pin, peer).await,
            after => after,
        };
        match after {
            After::Next if !worker.shared.draining.is_cancelled() => {}
            After::Next | After::Close | After::Pinned(_) => {
                let linger = Linger::new(&worker.shared.config, socket.unread);
                if let Err(cut) = socket.close(linger).await {
                    worker.shared.metrics.client_linger_cut(cut);
                }
                return;
            }
            After::Abort => return socket.abort().await,
        }
    }
}

/// Reads the next request's head, and tells when it began; `None` when the client has no more or nothing to say for too long,
/// or when no request has begun and the agent drains or the connection is `resting` too long for another's sake.
async fn read_head(
    worker: &Worker,
    client: &mut ClientSocket,
    resting: &Resting,
) -> Result<Option<(RequestHead, Instant)>, Error> {
    let config = &worker.shared.config;
    let limits = HeadLimits { bytes: config.limits.head_bytes, headers: config.limits.headers };
    let mut begun: Option<Instant> = has_begun(&client.buf).then(Instant::now);
    // The head is a part of the request.
    let head_limit = config.timeouts.head.into_iter().chain(config.timeouts.request).min();
    let idle = config.timeouts.keep_alive.map(|limit| Instant::now() + limit);
    let mut parser = RequestParser::default();
    loop {
        if let Some((head, length)) = parser.parse(&client.buf, &limits)? {
            let _ = client.buf.split_to(length);
            resting.end();
            return Ok(Some((head, begun.unwrap_or_else(Instant::now))));
        }
        if begun.is_none() {
            resting.begin();
        } else {
            resting.end();
        }
        let until = begun.map_or(idle, |begun| head_limit.map(|limit| begun + limit));
        let read = tokio::select! {
            biased;
            read = within(until, client.read(READ)) => read,
            () = drained(worker, resting), if begun.is_none() => {
                // What is in the socket already was sent to an agent that took requests.
                match client.read_now(READ) {
                    Ok(n) if n > 0 => Some(Ok(n)),
                    _ => return Ok(None),
                }
            }
            () = resting.closed(), if begun.is_none() => match client.read_now(READ) {
                Ok(n) if n > 0 => Some(Ok(n)),
                _ => {
                    worker.shared.metrics.client_shed();
                    resting.give_up();
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
            Some(Ok(_)) => begun = begun.or_else(|| has_begun(&client.buf).then(Instant::now)),
        }
    }
}

/// Resolves when the agent drains; of a connection that has had no request a little later, because its first may be on the way.
async fn drained(worker: &Worker, resting: &Resting) {
    worker.shared.draining.cancelled().await;
    if !resting.is_used() {
        tokio::time::sleep(FIRST).await;
    }
}

/// `None`: it was not done in time.
async fn within<T>(until: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match until {
        Some(until) => timeout_at(until, work).await.ok(),
        None => Some(work.await),
    }
}

/// The target in the request line of a head that was refused, as far as it came; empty where there is none.
fn path(buf: &[u8]) -> String {
    let line = buf.split(|&byte| byte == b'\r' || byte == b'\n').find(|line| !line.is_empty()).unwrap_or_default();
    let target = line.split(|&byte| byte == b' ').nth(1).unwrap_or_default();
    String::from_utf8_lossy(target).into_owned()
}

/// Empty lines before a request (RFC 9112 §2.2) do not begin one: some clients end a body with one, and then wait.
fn has_begun(buf: &[u8]) -> bool {
    buf.iter().any(|&byte| byte != b'\r' && byte != b'\n')
}
