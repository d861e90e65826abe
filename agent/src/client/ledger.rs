//! The account of what has been written to a connection, by us and by the kernel for us.
//!
//! What the kernel redirects reaches the socket a little later than the redirect, and what user space writes would overtake
//! it. So every write, and the close, first waits until the socket has taken exactly what the account says
//! (`settle`, the drain test).

use std::{io, time::Duration};

use tokio::net::TcpStream;

use super::patience::Patience;
use crate::kernel::socket;

/// Longest wait between two looks at a socket that has not settled: a jiffy at HZ=100.
const SETTLE_STEP: Duration = Duration::from_millis(10);

pub struct Ledger {
    /// `socket::bytes_written` when the account began.
    base: u64,
    /// Bytes since then, written by us or redirected by the kernel.
    booked: u64,
    /// Bytes were redirected since the account was last found to match.
    unsettled: bool,
}

impl Ledger {
    /// Of a connection on which nothing redirected is on its way.
    pub fn begin(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self { base: socket::bytes_written(stream)?, booked: 0, unsettled: false })
    }

    /// Books bytes that we have written.
    pub fn add_written(&mut self, bytes: u64) {
        self.booked += bytes;
    }

    /// Books bytes that the kernel has redirected.
    pub fn add_redirected(&mut self, bytes: u64) {
        self.booked += bytes;
        self.unsettled |= bytes > 0;
    }

    /// Waits until the socket has taken everything that was redirected to it: `TimedOut` when the client acknowledged nothing
    /// for too long. Cancel-safe.
    pub async fn settle(&mut self, stream: &TcpStream, mut patience: Patience) -> io::Result<()> {
        let mut wait = Duration::ZERO;
        for turn in 0u32.. {
            if !self.unsettled || self.taken(stream)? == self.booked {
                break;
            }
            socket::has_more(stream)?;
            // Usually the kernel's worker is done within microseconds.
            if turn < 32 {
                tokio::task::yield_now().await;
            } else {
                patience.begin(stream)?;
                patience.look(stream)?;
                wait = (wait + Duration::from_millis(1)).min(SETTLE_STEP);
                tokio::time::sleep(wait).await;
            }
        }
        self.unsettled = false;
        Ok(())
    }

    /// Takes what was booked as redirected and has not come out of the account; returns how much that is. Only when it will not
    /// come any more.
    pub fn forgive(&mut self, stream: &TcpStream) -> io::Result<u64> {
        let taken = self.taken(stream)?;
        let missing = self.booked.saturating_sub(taken);
        (self.booked, self.unsettled) = (taken, false);
        Ok(missing)
    }

    fn taken(&self, stream: &TcpStream) -> io::Result<u64> {
        Ok(socket::bytes_written(stream)?.wrapping_sub(self.base))
    }
}
