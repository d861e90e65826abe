//! Closes a client's connection in stages (RFC 9112 §9.6): sends FIN, then reads and discards what the client still
//! sends, then closes. Closing with unread bytes, or before they arrive, sends RST, and a RST can discard an answer
//! that the client has not read yet: a refused upload would fail without its reason.

use std::time::Duration;

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout, timeout_at},
};

use super::wire::ClientIo;
use crate::config::Config;

/// How long a client must be silent before it counts as finished. A slow, lossy link can pause for seconds.
const UNREAD: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_secs(1);
/// Bytes per read.
const PIECE: usize = 64 << 10;

/// Limits for reading and discarding what a client still sends.
#[derive(Debug, Clone, Copy)]
pub struct Linger {
    pub(super) time: Duration,
    pub(super) quiet: Duration,
    pub(super) bytes: u64,
}

impl Linger {
    /// `unread`: the answer was sent before the whole request was read, so the client may still be sending.
    pub fn new(config: &Config, unread: bool) -> Self {
        let quiet = if unread { UNREAD } else { READ };
        Self { time: config.timeouts.linger, quiet, bytes: config.limits.linger_bytes }
    }
}

impl Default for Linger {
    /// The limits of the default configuration for a client that has been read.
    fn default() -> Self {
        Self::new(&Config::new(Vec::new()), false)
    }
}

/// The metric label for the limit that ended the lingering close.
pub type Cut = &'static str;

/// Closes the connection. `Err` if a limit was reached before the client closed its side.
pub async fn discard(mut wire: ClientIo, mut buf: BytesMut, linger: Linger) -> Result<(), Cut> {
    let until = Instant::now() + linger.time;
    // Waits only to send TLS's close_notify. If the connection is broken, nothing remains to be done.
    match timeout_at(until, wire.shutdown()).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Ok(()),
        Err(_) => return Err("time"),
    }
    let mut taken = 0;
    while taken < linger.bytes {
        buf.clear();
        buf.reserve(PIECE);
        match timeout_at(until, timeout(linger.quiet, wire.read_buf(&mut buf))).await {
            Err(_) => return Err("time"),
            Ok(Err(_)) => return Err("quiet"),
            Ok(Ok(Ok(0) | Err(_))) => return Ok(()),
            Ok(Ok(Ok(read))) => taken += read as u64,
        }
    }
    Err("bytes")
}
