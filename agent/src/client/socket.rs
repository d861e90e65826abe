//! A client's HTTP/1.1 connection: reads, writes, and the account of what has been written to it by whom.
//!
//! What the kernel redirects reaches the socket a little later than the redirect, and what user space writes would overtake
//! it. So every write, and the close, first waits until the socket has taken exactly what the account says
//! (`settle`, the drain test).

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::TcpStream,
};

use crate::{
    kernel::socket,
    steer::{RegisterError, WorkerSteering},
};

/// Longest wait between two looks at a socket that has not settled: a jiffy at HZ=100.
const SETTLE_STEP: Duration = Duration::from_millis(10);

/// How long the kernel's worker may take to hand over what was redirected, before a close is a reset.
const SETTLE: Duration = Duration::from_secs(30);
/// How long, and for how many bytes, a closed connection is still read: a client that is answered before it has sent all of a
/// large body usually looks for the answer only afterwards.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;

pub struct ClientSocket {
    stream: TcpStream,
    /// Read and not yet used: the rest of a request, or the beginning of the next.
    pub buf: BytesMut,
    /// `socket::bytes_written` when the connection was taken over.
    base: u64,
    /// Bytes since then, written by us or redirected by the kernel.
    account: u64,
    /// Bytes were redirected since the account was last found to match.
    unsettled: bool,
    key: Option<u64>,
    resets: bool,
}

impl ClientSocket {
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let base = socket::bytes_written(&stream)?;
        Ok(Self { stream, buf: BytesMut::new(), base, account: 0, unsettled: false, key: None, resets: false })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Makes the connection a possible target, once; returns its key.
    pub fn make_target(&mut self, steering: &WorkerSteering, send_buffer: u32) -> Result<u64, RegisterError> {
        if let Some(key) = self.key {
            return Ok(key);
        }
        socket::set_send_buffer(&self.stream, send_buffer)?;
        let key = steering.register_target(&self.stream)?;
        self.key = Some(key);
        Ok(key)
    }

    /// Reads what is there into `buf`, which grows by up to about `room`; 0 is the end of the stream. Cancel-safe.
    pub async fn read(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        self.stream.read_buf(&mut self.buf).await
    }

    /// As [`read`](Self::read), without waiting.
    pub fn read_now(&mut self, room: usize) -> io::Result<usize> {
        self.make_room(room);
        socket::receive_into(&self.stream, &mut self.buf)
    }

    fn make_room(&mut self, room: usize) {
        if self.buf.capacity() - self.buf.len() < room / 4 {
            self.buf.reserve(room);
        }
    }

    /// Writes all of it, behind whatever the kernel has redirected. Not cancel-safe: after a cancelled write the
    /// connection can only be broken off.
    pub async fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        self.settle().await?;
        self.stream.write_all(buf).await?;
        self.account += buf.len() as u64;
        Ok(())
    }

    /// Books bytes that the kernel has redirected here.
    pub fn add_redirected(&mut self, bytes: u64) {
        self.account += bytes;
        self.unsettled |= bytes > 0;
    }

    /// Bytes that the client has not acknowledged yet.
    pub fn send_queue(&self) -> io::Result<u32> {
        socket::send_queue(&self.stream)
    }

    /// Waits until the socket has taken everything that was redirected to it. Cancel-safe.
    pub async fn settle(&mut self) -> io::Result<()> {
        let mut wait = Duration::ZERO;
        for turn in 0u32.. {
            if !self.unsettled || socket::bytes_written(&self.stream)?.wrapping_sub(self.base) == self.account {
                break;
            }
            self.check()?;
            // Usually the kernel's worker is done within microseconds.
            if turn < 32 {
                tokio::task::yield_now().await;
            } else {
                wait = (wait + Duration::from_millis(1)).min(SETTLE_STEP);
                tokio::time::sleep(wait).await;
            }
        }
        self.unsettled = false;
        Ok(())
    }

    /// An error when the connection is broken.
    fn check(&self) -> io::Result<()> {
        match socket::peek(&self.stream, &mut [0]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Resolves when the client has left: closed, closed its writing side, or reset. Never resolves once the client has
    /// sent something ahead of time (the next request): what lies behind that cannot be seen. Cancel-safe.
    pub async fn gone(&self) {
        loop {
            if self.stream.readable().await.is_err() {
                return;
            }
            match self.stream.try_io(Interest::READABLE, || socket::peek(&self.stream, &mut [0])) {
                Ok(0) => return,
                Ok(_) => std::future::pending().await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    /// Ends the connection in order: everything written arrives, then FIN. Reads on for a moment, because closing with
    /// bytes unread would send RST and take what is on its way from the client.
    pub async fn close(mut self) {
        if !matches!(tokio::time::timeout(SETTLE, self.settle()).await, Ok(Ok(()))) {
            // What was redirected has not all arrived at the socket, and the close would drop it: not without a sign.
            socket::set_reset_on_close(&self.stream, true);
            return;
        }
        if self.resets {
            socket::set_reset_on_close(&self.stream, false);
        }
        let linger = async {
            self.stream.shutdown().await?;
            let mut rest = [0; 4096];
            let mut taken = 0;
            while taken < LINGER_BYTES {
                match self.stream.read(&mut rest).await? {
                    0 => break,
                    n => taken += n,
                }
            }
            io::Result::Ok(())
        };
        // The client may take its time with what is queued: the kernel delivers that after the close too.
        let _ = tokio::time::timeout(LINGER, linger).await;
    }

    /// From here on, any end of the connection, that of the process included, is a reset: the body being sent ends only by
    /// close, and an early FIN would look like its end. [`close`](Self::close) in order takes it back.
    pub fn reset_on_close(&mut self) {
        self.resets = true;
        socket::set_reset_on_close(&self.stream, true);
    }

    /// Breaks the connection off in the middle of a message. What has been sent of it still arrives, except where only a
    /// reset tells the client that it is not the whole.
    pub async fn abort(mut self) {
        if !self.resets {
            let _ = tokio::time::timeout(Duration::from_secs(1), self.settle()).await;
        }
    }
}
