//! Ending a client's connection in stages (RFC 9112 §9.6): our side first, then what the client still sends is read and thrown
//! away, then the rest. A close with bytes unread, or before they have come, is a reset, and a reset takes what has been sent from a
//! client that has not read it yet: an upload that was refused would fail without saying why.

use std::time::Duration;

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout, timeout_at},
};

use super::wire::Wire;
use crate::config::Config;

/// How long nothing has to come before a client is taken to have sent all. A slow link that loses packets pauses for seconds.
const UNREAD: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_secs(1);
/// Read at once.
const PIECE: usize = 64 << 10;

/// How long, and for how many bytes, a client is read that is not listened to any more.
#[derive(Debug, Clone, Copy)]
pub struct Linger {
    time: Duration,
    quiet: Duration,
    bytes: u64,
}

impl Linger {
    /// `unread`: the client was answered before it had been read, so it may be sending.
    pub fn new(config: &Config, unread: bool) -> Self {
        let quiet = if unread { UNREAD } else { READ };
        Self { time: config.timeouts.linger, quiet, bytes: config.limits.linger_bytes }
    }
}

impl Default for Linger {
    /// By the default settings, for a client that has been read.
    fn default() -> Self {
        Self::new(&Config::new(Vec::new()), false)
    }
}

/// Why a client is not read to its end: a label.
pub type Cut = &'static str;

/// Ends the connection. `Err`: before the client had ended its side.
pub async fn discard(mut wire: Wire, mut buf: BytesMut, linger: Linger) -> Result<(), Cut> {
    let until = Instant::now() + linger.time;
    // Waits only for what TLS says last; with the connection broken there is nothing to wait for.
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
