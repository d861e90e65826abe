//! Limits of `penstock epp` over all of its clients: connections, streams and bytes of held bodies.
//!
//! Each is a budget. A reservation is returned when it is dropped.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// The limits of `penstock epp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EppServerLimits {
    /// Open connections. Further ones are closed at once. Default 1024.
    pub connections: usize,
    /// Open streams. Further ones get RESOURCE_EXHAUSTED. Default 65536.
    pub streams: usize,
    /// Bytes of request bodies that are held for all streams. Further ones get 503. Default 1073741824.
    pub held_bytes: usize,
    /// Fields of a head. More fail the stream. Default 1024.
    pub fields: usize,
    /// Bytes of a head's fields. More fail the stream. Default 262144.
    pub field_bytes: usize,
    /// Messages of one stream before its request is complete. More fail the stream. Default 65536.
    pub messages: usize,
    /// How long a stream may be silent before its request is complete. Default 60 s.
    pub idle: Duration,
    /// How long a stream may be silent afterwards, until the response ends. It is long, because some proxies report only the end
    /// of a response. Default 1 h.
    pub response_idle: Duration,
}

impl Default for EppServerLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            streams: 65_536,
            held_bytes: 1 << 30,
            fields: 1024,
            field_bytes: 256 << 10,
            messages: 65_536,
            idle: Duration::from_secs(60),
            response_idle: Duration::from_secs(3600),
        }
    }
}

/// A count that has a limit.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    /// An empty reservation.
    pub(super) fn part(self: &Arc<Self>) -> Part {
        Part { budget: Arc::clone(self), amount: 0 }
    }

    /// Reserves one. Returns `None` if the budget is used up.
    pub(super) fn one(self: &Arc<Self>) -> Option<Part> {
        let mut part = self.part();
        part.grow(1).then_some(part)
    }
}

/// A reservation of a part of a budget.
#[derive(Debug)]
pub(super) struct Part {
    budget: Arc<Budget>,
    amount: usize,
}

impl Part {
    /// Returns the reservation to the budget.
    pub(super) fn release(&mut self) {
        self.budget.used.fetch_sub(std::mem::take(&mut self.amount), Relaxed);
    }

    /// Reserves `by` more. Returns false if the budget has not enough left.
    pub(super) fn grow(&mut self, by: usize) -> bool {
        let Budget { used, limit } = &*self.budget;
        let add = |used: usize| used.checked_add(by).filter(|sum| sum <= limit);
        let granted = used.fetch_update(Relaxed, Relaxed, add).is_ok();
        self.amount += if granted { by } else { 0 };
        granted
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.release();
    }
}

/// A connection that is counted while it is open.
pub(super) struct Counted {
    stream: TcpStream,
    _part: Part,
}

impl Counted {
    pub(super) fn new(stream: TcpStream, part: Part) -> Self {
        Self { stream, _part: part }
    }
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_part_is_returned_to_the_budget() {
        let budget = Budget::new(3);
        let mut part = budget.part();
        assert!(part.grow(2) && !part.grow(2) && !part.grow(usize::MAX));
        let one = budget.one();
        assert!(one.is_some() && budget.one().is_none());
        drop(part);
        assert!(budget.part().grow(2) && !budget.part().grow(3));
    }
}
