//! A client's connection: one request after the other, until one side has enough.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::{
    client::{Client, ClientSocket},
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
    let Ok(mut socket) = ClientSocket::new(stream) else { return };
    loop {
        let head = read_head(worker, &mut socket).await;
        let mut client = Client::Http1(socket);
        let after = match head {
            Ok(Some(head)) => proxy::run(worker, &mut client, head, peer).await,
            Ok(None) => After::Close,
            Err(error) => {
                proxy::refuse(worker, &mut client, &error).await;
                After::Close
            }
        };
        let Client::Http1(back) = client;
        socket = back;
        match after {
            After::Next if !worker.shared.draining.is_cancelled() => {}
            After::Next | After::Close => return socket.close().await,
            After::Abort => return socket.abort().await,
        }
    }
}

/// Reads the next request's head; `None` when the client has no more or nothing to say for too long, or when the agent
/// drains and no request has begun.
async fn read_head(worker: &Worker, client: &mut ClientSocket) -> Result<Option<RequestHead>, Error> {
    let config = &worker.shared.config;
    let limits = HeadLimits { bytes: config.limits.head_bytes, headers: config.limits.headers };
    let mut begun: Option<Instant> = has_begun(&client.buf).then(Instant::now);
    let idle = Instant::now() + config.timeouts.keep_alive;
    loop {
        if let Some((head, length)) = parse_request(&client.buf, &limits)? {
            let _ = client.buf.split_to(length);
            return Ok(Some(head));
        }
        let until = begun.map_or(idle, |begun| begun + config.timeouts.head);
        let read = tokio::select! {
            biased;
            read = timeout_at(until, client.read(READ)) => read,
            () = worker.shared.draining.cancelled(), if begun.is_none() => {
                // What is in the socket already was sent to an agent that took requests.
                match client.read_now(READ) {
                    Ok(n) if n > 0 => Ok(Ok(n)),
                    _ => return Ok(None),
                }
            }
        };
        match read {
            Err(_) if begun.is_some() => return Err(Error::HeadTimeout(config.timeouts.head)),
            Ok(Ok(0)) if begun.is_some() => return Err(Error::HeadCut),
            Ok(Err(_)) if begun.is_some() => return Err(Error::ClientGone),
            Err(_) | Ok(Ok(0) | Err(_)) => return Ok(None),
            Ok(Ok(_)) => begun = begun.or_else(|| has_begun(&client.buf).then(Instant::now)),
        }
    }
}

/// Empty lines before a request (RFC 9112 §2.2) do not begin one: some clients end a body with one, and then wait.
fn has_begun(buf: &[u8]) -> bool {
    buf.iter().any(|&byte| byte != b'\r' && byte != b'\n')
}
