//! Reads the PROXY header with which a load balancer begins a connection, and nothing beyond it: what follows is read as on any other
//! connection, by user space, TLS or the kernel.

use std::net::SocketAddr;

use tokio::{io::AsyncReadExt as _, net::TcpStream, time::sleep};

use super::FIRST_REQUEST;
use crate::{
    deadline::{self, with_deadline},
    proxy_header::{Extent, LONGEST, ProxyHeaderError, extent, parse},
    worker::Current,
};

/// Returns where the connection comes from: the address in its header, or `peer` if the header names none. `None` if the connection has
/// to be closed. The header has the time limit of a request head.
pub(super) async fn announced(current: &Current, stream: &mut TcpStream, peer: SocketAddr) -> Option<SocketAddr> {
    let (until, draining) = {
        let worker = current.worker();
        (deadline::after(worker.shared.config.timeouts.head), worker.shared.draining.clone())
    };
    let drained = async {
        draining.cancelled().await;
        // A connection without a request, as those of health checks are.
        sleep(FIRST_REQUEST).await;
    };
    let read = tokio::select! {
        biased;
        read = with_deadline(until, read(stream)) => read.unwrap_or(Err(ProxyHeaderError::Timeout)),
        () = drained => return None,
    };
    match read {
        Ok(Some(announced)) => Some(announced.unwrap_or(peer)),
        Ok(None) => None,
        Err(error) => {
            tracing::debug!(%peer, %error, "connection closed");
            current.worker().shared.metrics.proxy_header_refused(error.reason());
            None
        }
    }
}

/// Returns `None` if the connection ended before its first byte.
async fn read(stream: &mut TcpStream) -> Result<Option<Option<SocketAddr>>, ProxyHeaderError> {
    let mut header = Vec::new();
    let mut ahead = vec![0; LONGEST];
    loop {
        // Only what belongs to the header is taken, so that the next look waits for bytes that have not been seen.
        let seen = match stream.peek(&mut ahead[header.len()..]).await {
            Ok(0) | Err(_) if header.is_empty() => return Ok(None),
            Ok(0) | Err(_) => return Err(ProxyHeaderError::Cut),
            Ok(more) => header.len() + more,
        };
        let found = extent(&ahead[..seen])?;
        let end = if let Extent::Whole(length) = found { length } else { seen };
        let begin = header.len();
        header.resize(end, 0);
        stream.read_exact(&mut header[begin..]).await.map_err(|_| ProxyHeaderError::Cut)?;
        if matches!(found, Extent::Whole(_)) {
            return parse(&header).map(Some);
        }
    }
}
