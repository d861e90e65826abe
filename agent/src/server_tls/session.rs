//! The TLS session of a connection whose two directions are used at the same time, in one task. It stands beside the socket and does
//! not own it. Only [`TlsSession::read`] waits.

use std::{
    cell::RefCell,
    io::{self, BufRead as _, Read, Write},
};

use bytes::BytesMut;
use rustls::ClientConnection;
use tokio::{io::Interest, net::TcpStream};

use crate::kernel::socket;

/// The TLS state of one connection.
pub struct TlsSession(RefCell<ClientConnection>);

/// Reads and writes a socket without waiting.
struct Now<'a>(&'a TcpStream);

impl Read for Now<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Asks the socket itself: tokio may not know so far that it is readable.
        let got = socket::receive(self.0, buf);
        if got.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            // Makes the next wait for readiness wait.
            return self.0.try_io(Interest::READABLE, || socket::receive(self.0, buf));
        }
        got
    }
}

impl Write for Now<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TlsSession {
    pub fn new(connection: ClientConnection) -> Self {
        Self(RefCell::new(connection))
    }

    /// Reads at most the buffer's spare capacity. `Ok(0)` is the orderly end; an end without close_notify is an error, because bytes
    /// may be missing.
    pub fn read_now(&self, tcp: &TcpStream, buf: &mut BytesMut) -> io::Result<usize> {
        let mut tls = self.0.borrow_mut();
        loop {
            match tls.reader().fill_buf() {
                Ok(plain) => {
                    let taken = plain.len().min(buf.capacity() - buf.len());
                    buf.extend_from_slice(&plain[..taken]);
                    tls.reader().consume(taken);
                    return Ok(taken);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            tls.read_tls(&mut Now(tcp))?;
            let processed = tls.process_new_packets();
            // Answers of the protocol, such as an alert. What does not fit goes out with the next write.
            let _ = flush(&mut tls, tcp);
            if let Err(error) = processed {
                tracing::debug!(%error, "TLS connection to an endpoint failed");
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }

    /// Like [`read_now`](Self::read_now), but waits. Cancel-safe.
    pub async fn read(&self, tcp: &TcpStream, buf: &mut BytesMut) -> io::Result<usize> {
        loop {
            match self.read_now(tcp, buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.readable().await?,
                read => return read,
            }
        }
    }

    /// Takes a part of `out`. `WouldBlock` if the endpoint takes nothing now.
    pub fn try_write(&self, tcp: &TcpStream, out: &[u8]) -> io::Result<usize> {
        let mut tls = self.0.borrow_mut();
        pass(flush(&mut tls, tcp))?;
        // 0 if as much as is kept at most waits for the socket.
        let taken = tls.writer().write(out)?;
        pass(flush(&mut tls, tcp))?;
        if taken == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    /// `WouldBlock` until the socket has taken everything.
    pub fn try_flush(&self, tcp: &TcpStream) -> io::Result<()> {
        flush(&mut self.0.borrow_mut(), tcp)
    }

    /// Tells the endpoint that nothing follows, as far as that fits into the socket.
    pub fn say_goodbye(&self, tcp: &TcpStream) {
        let mut tls = self.0.borrow_mut();
        tls.send_close_notify();
        let _ = flush(&mut tls, tcp);
    }
}

fn flush(tls: &mut ClientConnection, tcp: &TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut Now(tcp))?;
    }
    Ok(())
}

/// Passes over a socket that takes nothing now.
fn pass(flushed: io::Result<()>) -> io::Result<()> {
    match flushed {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        flushed => flushed,
    }
}
