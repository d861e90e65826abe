//! Limits of `penstock epp` over all of its clients: connections, streams and bytes of held bodies.
//!
//! Each is a quota. A reservation is returned when it is dropped.

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
pub(super) struct Quota {
    used: AtomicUsize,
    limit: usize,
}

impl Quota {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    /// An empty reservation.
    pub(super) fn reservation(self: &Arc<Self>) -> Reservation {
        Reservation { quota: Arc::clone(self), amount: 0 }
    }

    /// Reserves one. Returns `None` if the quota is used up.
    pub(super) fn one(self: &Arc<Self>) -> Option<Reservation> {
        let mut reservation = self.reservation();
        reservation.grow(1).then_some(reservation)
    }
}

/// A reservation of a part of a quota.
#[derive(Debug)]
pub(super) struct Reservation {
    quota: Arc<Quota>,
    amount: usize,
}

impl Reservation {
    /// Returns the reservation to the quota.
    pub(super) fn release(&mut self) {
        self.quota.used.fetch_sub(std::mem::take(&mut self.amount), Relaxed);
    }

    /// Reserves `by` more. Returns false if the quota has not enough left.
    pub(super) fn grow(&mut self, by: usize) -> bool {
        let Quota { used, limit } = &*self.quota;
        let add = |used: usize| used.checked_add(by).filter(|sum| sum <= limit);
        let granted = used.fetch_update(Relaxed, Relaxed, add).is_ok();
        self.amount += if granted { by } else { 0 };
        granted
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}

/// A connection that is counted while it is open.
pub(super) struct CountedConnection {
    stream: TcpStream,
    _reservation: Reservation,
}

impl CountedConnection {
    pub(super) fn new(stream: TcpStream, reservation: Reservation) -> Self {
        Self { stream, _reservation: reservation }
    }
}

impl Connected for CountedConnection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for CountedConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for CountedConnection {
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
    fn dropped_reservation_is_returned_to_the_quota() {
        let quota = Quota::new(3);
        let mut reservation = quota.reservation();
        assert!(reservation.grow(2) && !reservation.grow(2) && !reservation.grow(usize::MAX));
        let one = quota.one();
        assert!(one.is_some() && quota.one().is_none());
        drop(reservation);
        assert!(quota.reservation().grow(2) && !quota.reservation().grow(3));
    }
}
