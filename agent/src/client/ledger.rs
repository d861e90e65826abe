//! Accounts for the bytes written to a client connection, by user space and by the kernel.
//!
//! Redirected bytes reach the socket shortly after the redirect, and a write from user space could overtake them. So
//! every write, and the close, first waits until the socket has taken exactly the booked bytes (`settle`).

use std::{io, time::Duration};

use tokio::{net::TcpStream, time::Instant};

use super::patience::Patience;
use crate::kernel::socket;

/// Longest pause between two checks of an unsettled socket: one jiffy at HZ=100.
const SETTLE_STEP: Duration = Duration::from_millis(10);
/// Upper bound for a non-blocking `sendmsg` in progress.
const SENDING: Duration = Duration::from_millis(100);

pub struct Ledger {
    /// `socket::bytes_written` at the start of the account.
    base: u64,
    /// Bytes since then, written by user space or redirected by the kernel.
    booked: u64,
    /// Bytes were redirected after the account last matched.
    unsettled: bool,
}

impl Ledger {
    /// Starts the account of a connection that has no redirected bytes in transit.
    pub fn begin(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self { base: socket::bytes_written(stream)?, booked: 0, unsettled: false })
    }

    /// Books bytes that user space has written.
    pub fn add_written(&mut self, bytes: u64) {
        self.booked += bytes;
    }

    /// Books bytes that the kernel has redirected.
    pub fn add_redirected(&mut self, bytes: u64) {
        self.booked += bytes;
        self.unsettled |= bytes > 0;
    }

    /// Waits until the socket has taken all redirected bytes. Returns `TimedOut` if the client acknowledges nothing for
    /// too long. Cancel-safe.
    /// Returns false if the bytes have not arrived and `unless`, called each time that a `sendmsg` in progress would have ended,
    /// returned true.
    pub async fn settle_unless(
        &mut self,
        stream: &TcpStream,
        mut patience: Patience,
        mut unless: impl FnMut() -> bool,
    ) -> io::Result<bool> {
        let (mut wait, mut asked) = (Duration::ZERO, Instant::now());
        for turn in 0u32.. {
            if !self.unsettled || self.taken(stream)? == self.booked {
                break;
            }
            socket::has_more(stream)?;
            // The kernel's worker usually finishes within microseconds.
            if turn < 32 {
                tokio::task::yield_now().await;
            } else {
                patience.begin(stream)?;
                patience.look(stream)?;
                wait = (wait + Duration::from_millis(1)).min(SETTLE_STEP);
                tokio::time::sleep(wait).await;
                if asked.elapsed() >= SENDING {
                    if unless() {
                        return Ok(false);
                    }
                    asked = Instant::now();
                }
            }
        }
        self.unsettled = false;
        Ok(true)
    }

    /// Removes redirected bytes that the socket has not taken from the account and returns their number. Only valid
    /// once they can no longer arrive.
    pub fn write_off_unsettled(&mut self, stream: &TcpStream) -> io::Result<u64> {
        let taken = self.taken(stream)?;
        let missing = self.booked.saturating_sub(taken);
        (self.booked, self.unsettled) = (taken, false);
        Ok(missing)
    }

    fn taken(&self, stream: &TcpStream) -> io::Result<u64> {
        Ok(socket::bytes_written(stream)?.wrapping_sub(self.base))
    }
}
