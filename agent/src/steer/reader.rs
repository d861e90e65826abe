//! The reading side of a connection, and the count of what was read.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::net::TcpStream;

use super::{session::Inlet, source::Source};
use crate::{kernel::socket, server_tls::session::TlsSession};

/// How often to look for passed bytes that arrive after the end of the stream.
const LATE_TURNS: u32 = 1000;
/// The time between two of these looks.
const LATE_TURN: Duration = Duration::from_millis(1);

pub struct Reader<'a> {
    pub stream: &'a TcpStream,
    pub source: Option<&'a Source>,
    /// Set if the peer is an endpoint that speaks TLS.
    pub tls: Option<&'a TlsSession>,
    /// Bytes that user space has read since the kernel programs see the connection.
    pub consumed: &'a mut u64,
}

impl Reader<'_> {
    /// Waits for bytes and reads at most the buffer's spare capacity. Returns 0 at the end of the stream. Cancel-safe.
    pub async fn read(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        if let Some(tls) = self.tls {
            let n = tls.read(self.stream, buf).await?;
            return self.count_read(n);
        }
        let n = loop {
            self.stream.readable().await?;
            match self.stream.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read?,
            }
        };
        let n = if n == 0 { self.late(buf).await? } else { n };
        self.count_read(n)
    }

    /// Reads without waiting. It asks the socket itself rather than tokio's readiness, and runs after any verdict in progress.
    pub fn read_now(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        let n = match self.tls {
            Some(tls) => tls.read_now(self.stream, buf)?,
            None => socket::receive_into(self.stream, buf)?,
        };
        self.count_read(n)
    }

    /// Whether bytes or the end of the stream have arrived and were not read.
    pub fn has_more(&self) -> io::Result<bool> {
        socket::has_more(self.stream)
    }

    /// Whether the kernel passed bytes to user space that have not been read.
    pub fn is_behind(&self) -> bool {
        self.source.is_some_and(|source| source.passed() != *self.consumed)
    }

    /// Reads after the peer has closed its side. Under memory pressure, passed bytes may arrive after the FIN, because
    /// `sk_psock_verdict_apply` leaves them to a work queue, so this waits for them.
    async fn late(&self, buf: &mut BytesMut) -> io::Result<usize> {
        for _ in 0..LATE_TURNS {
            if !self.is_behind() {
                return Ok(0);
            }
            tokio::time::sleep(LATE_TURN).await;
            if let Ok(n @ 1..) = socket::receive_into(self.stream, buf) {
                return Ok(n);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// Counts `n` bytes as read. Fails if the kernel lost count of the bytes that it passed.
    fn count_read(&mut self, n: usize) -> io::Result<usize> {
        if self.source.is_some_and(Source::is_astray) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel lost track of the stream"));
        }
        *self.consumed += n as u64;
        Ok(n)
    }
}

/// One direction of a connection whose other direction is in use at the same time: never quiet.
impl Inlet for Reader<'_> {
    fn source(&self) -> Option<&Source> {
        self.source
    }

    fn reader(&mut self) -> io::Result<Reader<'_>> {
        Ok(Reader { stream: self.stream, source: self.source, tls: self.tls, consumed: self.consumed })
    }

    fn wait_for_verdict(&self) {
        socket::wait_for_verdict(self.stream);
    }
}
