//! A client's connection: one request after the other, until one side has enough.

use std::net::SocketAddr;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::{
    client::ClientSocket,
    error::Error,
    http::{
        head::HeadLimits,
        request::{RequestHead, parse_request},
    },
    proxy::{self, After},
    worker::Worker,
};

/// First read of a connection; larger heads grow the buffer up to the configured limit.
const READ: usize = 4096;

/// Serves the connection to its end.
pub async fn serve(worker: &Worker, stream: TcpStream, peer: SocketAddr) {
    // Fails only when the client has left already.
    let Ok(mut client) = ClientSocket::new(stream) else { return };
    let mut buf = BytesMut::new();
    loop {
        let after = match read_head(worker, &mut client, &mut buf).await {
            Ok(Some((head, begun))) => proxy::run(worker, &mut client, &mut buf, head, begun, peer).await,
            Ok(None) => return client.close().await,
            Err(error) => {
                proxy::refuse(worker, &mut client, &error).await;
                After::Close
            }
        };
        match after {
            After::Next if !worker.shared.draining.is_cancelled() => {}
            After::Next | After::Close => return client.close().await,
            After::Abort => return client.abort().await,
        }
    }
}

/// Reads the next request's head, and when it began; `None` when the client has no more or nothing to say for too long, or when the agent
/// drains and no request has begun.
async fn read_head(
    worker: &Worker,
    client: &mut ClientSocket,
    buf: &mut BytesMut,
) -> Result<Option<(RequestHead, Instant)>, Error> {
    let config = &worker.shared.config;
    let limits = HeadLimits { bytes: config.limits.head_bytes, headers: config.limits.headers };
    let mut begun: Option<Instant> = has_begun(buf).then(Instant::now);
    // The head is a part of the request.
    let head_limit = config.timeouts.head.into_iter().chain(config.timeouts.request).min();
    let idle = config.timeouts.keep_alive.map(|limit| Instant::now() + limit);
    loop {
        if let Some((head, length)) = parse_request(buf, &limits)? {
            let _ = buf.split_to(length);
            return Ok(Some((head, begun.unwrap_or_else(Instant::now))));
        }
        if buf.capacity() - buf.len() < READ / 4 {
            buf.reserve(READ);
        }
        let until = begun.map_or(idle, |begun| head_limit.map(|limit| begun + limit));
        let read = tokio::select! {
            biased;
            read = within(until, client.read(buf)) => read,
            () = worker.shared.draining.cancelled(), if begun.is_none() => {
                // What is in the socket already was sent to an agent that took requests.
                match client.read_now(buf) {
                    Ok(n) if n > 0 => Some(Ok(n)),
                    _ => return Ok(None),
                }
            }
        };
        match read {
            None if begun.is_some() => {
                return Err(Error::HeadTimeout(head_limit.unwrap_or_default()));
            }
            Some(Ok(0)) if begun.is_some() => return Err(Error::HeadCut),
            Some(Err(_)) if begun.is_some() => return Err(Error::ClientGone),
            None => {
                worker.shared.metrics.client_idle_closed();
                return Ok(None);
            }
            Some(Ok(0) | Err(_)) => return Ok(None),
            Some(Ok(_)) => begun = begun.or_else(|| has_begun(buf).then(Instant::now)),
        }
    }
}

/// `None`: it was not done in time.
async fn within<T>(until: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match until {
        Some(until) => timeout_at(until, work).await.ok(),
        None => Some(work.await),
    }
}

/// Empty lines before a request (RFC 9112 §2.2) do not begin one: some clients end a body with one, and then wait.
fn has_begun(buf: &[u8]) -> bool {
    buf.iter().any(|&byte| byte != b'\r' && byte != b'\n')
}
