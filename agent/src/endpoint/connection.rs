//! One connection to an endpoint: what was read of it, its slot where it can be steered, and the two ways of waiting on it.
//!
//! While user space reads, tokio watches for bytes. While the kernel redirects, each segment would wake the thread for
//! nothing, so the socket is watched for errors only; bytes, FIN and the end of the message come as events of the slot.

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use super::{sending::Sending, times::Times};
use crate::{
    kernel::socket,
    metrics::InFlight,
    steer::{RegisterError, Source, WorkerSteering},
};

/// How long bytes that were let through may come behind the end of the stream: turns, and the length of one.
const LATE_TURNS: u32 = 1000;
const LATE_TURN: Duration = Duration::from_millis(1);

pub struct EndpointConnection {
    // Before `source`: a slot outlives its socket.
    io: Io,
    source: Option<Source>,
    pub address: SocketAddr,
    /// The endpoint's address is on this machine.
    pub local: bool,
    /// Bytes that user space has read since the connection was made.
    pub consumed: u64,
    pub(super) idle_since: Instant,
    /// The slot, in the metrics.
    pub(super) counted: Option<InFlight>,
    /// Nothing is outstanding on it.
    resting: bool,
    /// The request that the connection carries, which holds the stream until it is sent.
    sending: Option<Sending>,
}

enum Io {
    Ready(Rc<TcpStream>),
    Quiet(AsyncFd<std::net::TcpStream>),
    /// Only while one becomes the other, or after that has failed.
    Gone,
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl EndpointConnection {
    /// Connects, and makes the connection known to the kernel before it is made, and before anything can arrive on it.
    pub async fn connect(
        address: SocketAddr,
        times: Times,
        steering: Option<&Rc<WorkerSteering>>,
        receive_buffer: u32,
    ) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // What is not for the kernel to carry waits here while a client stalls, so this bounds it. The kernel doubles the value.
        socket.set_recv_buffer_size(receive_buffer / 2)?;
        socket::detect_unreachable(&socket, times.unreachable)?;
        let unsteered = |error: RegisterError| {
            tracing::debug!(%address, %error, "endpoint connection cannot be steered");
        };
        let source = steering.and_then(|steering| steering.announce_source(&socket).map_err(unsteered).ok());
        let stream = match times.connect {
            Some(timeout) => tokio::time::timeout(timeout, socket.connect(address)).await??,
            // The kernel's own, some minutes.
            None => socket.connect(address).await?,
        };
        stream.set_nodelay(true)?;
        let local = address.ip().is_loopback() || stream.local_addr()?.ip() == address.ip();
        let source = source.filter(|source| source.insert(&stream).map_err(unsteered).is_ok());
        if source.is_some() {
            // What was let through has left the TCP queue, so the kernel would close with FIN although bytes are unread,
            // behind a window that is shut: an endpoint that only writes would not learn of it for `tcp_fin_timeout`.
            socket::set_reset_on_close(&stream, true);
        }
        let (io, consumed, idle_since) = (Io::Ready(Rc::new(stream)), 0, Instant::now());
        let (counted, resting, sending) = (None, false, None);
        Ok(Self { io, source, address, local, consumed, idle_since, counted, resting, sending })
    }

    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// The next response goes to the client with this key.
    pub fn announce(&self, target: Option<u64>) {
        if let (Some(source), Some(target)) = (&self.source, target) {
            source.slot().announce(target);
        }
    }

    fn ready(&self) -> io::Result<&TcpStream> {
        match &self.io {
            Io::Ready(stream) => Ok(stream),
            _ => Err(gone()),
        }
    }

    /// The stream, for what sends a request. It has to be let go before the connection turns quiet, and before it is dropped.
    pub fn stream(&self) -> io::Result<Rc<TcpStream>> {
        match &self.io {
            Io::Ready(stream) => Ok(Rc::clone(stream)),
            _ => Err(gone()),
        }
    }

    /// The connection carries this request from now on, and stops it when it is dropped.
    pub fn set_sending(&mut self, sending: Sending) {
        self.sending = Some(sending);
    }

    pub fn sending(&self) -> Option<&Sending> {
        self.sending.as_ref()
    }

    /// The request has been sent whole.
    pub fn is_sent(&self) -> bool {
        self.sending.as_ref().is_none_or(Sending::is_sent)
    }

    /// Bytes that the endpoint's kernel has acknowledged since the connection was made, and one for that; also when it has broken.
    /// `None`: not known.
    pub fn acknowledged(&self) -> Option<u64> {
        match &self.io {
            Io::Ready(stream) => socket::acknowledged(&**stream).ok(),
            Io::Quiet(quiet) => socket::acknowledged(quiet.get_ref()).ok(),
            Io::Gone => None,
        }
    }

    /// Puts the endpoint's own socket into the map for the length of its response: see [`Source::admit`].
    pub fn admit(&self) -> bool {
        self.is_sent() && self.source.as_ref().is_some_and(Source::admit)
    }

    /// The endpoint's own socket is as it was before the response: see [`Source::dismiss`].
    pub fn dismiss(&self) -> bool {
        self.source.as_ref().is_none_or(Source::dismiss)
    }

    /// From here on, an end of the connection is a reset, unless it is [resting](Self::set_resting) by then: what it carries
    /// would take a FIN for an end in order.
    pub fn reset_on_close(&self) {
        if let Ok(stream) = self.ready() {
            socket::set_reset_on_close(stream, true);
        }
    }

    /// Both directions at once.
    pub fn split(&mut self) -> io::Result<(Reader<'_>, &TcpStream)> {
        let Io::Ready(stream) = &self.io else { return Err(gone()) };
        Ok((Reader { stream, source: self.source.as_ref(), consumed: &mut self.consumed }, stream))
    }

    /// Bytes were let through to user space that it has not read.
    pub fn unread(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.slot().passed() != self.consumed)
    }

    /// The reading side beside the slot, to wait on both.
    pub fn listen(&mut self) -> io::Result<Option<(&Source, Reader<'_>)>> {
        let Io::Ready(stream) = &self.io else { return Err(gone()) };
        let Some(source) = self.source.as_ref() else { return Ok(None) };
        Ok(Some((source, Reader { stream, source: Some(source), consumed: &mut self.consumed })))
    }

    /// Reads what is there, at most the buffer's spare capacity; 0 is the end of the stream. Cancel-safe.
    pub async fn read(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        self.split()?.0.read(buf).await
    }

    /// Reads what is there without waiting. Unlike tokio's readiness, the answer is the socket's own, and given after any
    /// verdict that was in progress.
    pub fn read_now(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        self.split()?.0.read_now(buf)
    }

    /// Returns when no verdict of this connection is in progress: reading TCP_INFO takes the lock that verdicts run under
    /// (`tcp_get_info`), and unlike a read does not take the socket's error.
    pub fn wait_for_verdict(&self) {
        let _ = match &self.io {
            Io::Ready(stream) => socket::bytes_written(&**stream),
            Io::Quiet(quiet) => socket::bytes_written(quiet.get_ref()),
            Io::Gone => return,
        };
    }

    /// From now on, only errors wake us. Fails while a request is being sent.
    pub fn quiet(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.io, Io::Gone) {
            Io::Ready(stream) => match Rc::try_unwrap(stream) {
                Ok(stream) => self.io = Io::Quiet(socket::watch_errors(stream.into_std()?)?),
                Err(stream) => {
                    self.io = Io::Ready(stream);
                    return Err(io::ErrorKind::ResourceBusy.into());
                }
            },
            other => self.io = other,
        }
        Ok(())
    }

    /// From now on, bytes wake us again.
    pub fn attentive(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.io, Io::Gone) {
            Io::Quiet(quiet) => self.io = Io::Ready(Rc::new(TcpStream::from_std(quiet.into_inner())?)),
            other => self.io = other,
        }
        Ok(())
    }

    /// Resolves when a quiet connection breaks. Cancel-safe.
    pub async fn broken(&self) {
        match &self.io {
            Io::Quiet(quiet) => {
                // Whatever is ready on a socket without urgent data is an error or a hang-up.
                let _ = quiet.ready(Interest::PRIORITY).await;
            }
            _ => std::future::pending().await,
        }
    }

    /// Whether the last message is over; if not, closing the connection breaks it off.
    pub fn set_resting(&mut self, resting: bool) {
        self.resting = resting;
    }

    /// Something has come that has not been read: bytes, or the end.
    pub fn has_more(&self) -> io::Result<bool> {
        socket::has_more(self.ready()?)
    }

    /// Nothing has come on an idle connection: neither its end nor bytes that nobody asked for.
    pub(super) fn is_alive(&self) -> bool {
        matches!(self.has_more(), Ok(false))
    }
}

impl Drop for EndpointConnection {
    fn drop(&mut self) {
        // Lets go of the stream, so that it is closed here and before the slot.
        if let Some(sending) = &self.sending {
            sending.stop();
        }
        // The kernel must not go on redirecting to a client that we are about to leave.
        if let Some(source) = &self.source {
            source.slot().disarm();
        }
        if self.resting
            && let Ok(stream) = self.ready()
        {
            socket::set_reset_on_close(stream, false);
        }
    }
}

/// The reading side of a connection that the kernel looks at too.
pub struct Reader<'a> {
    pub stream: &'a TcpStream,
    pub source: Option<&'a Source>,
    /// Bytes that user space has read since the kernel looks.
    pub consumed: &'a mut u64,
}

impl Reader<'_> {
    /// As [`EndpointConnection::read`].
    pub async fn read(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        let n = loop {
            self.stream.readable().await?;
            match self.stream.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read?,
            }
        };
        let n = if n == 0 { self.late(buf).await? } else { n };
        book(self.source, self.consumed, n)
    }

    /// As [`EndpointConnection::read_now`].
    pub fn read_now(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        let n = socket::receive_into(self.stream, buf)?;
        book(self.source, self.consumed, n)
    }

    /// Bytes were let through to user space that it has not read.
    pub fn is_behind(&self) -> bool {
        self.source.is_some_and(|source| source.slot().passed() != *self.consumed)
    }

    /// The endpoint has closed its side. Bytes that the verdict let through under memory pressure may come after that
    /// (`sk_psock_verdict_apply` leaves them to a worker); they are waited for.
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
}

/// Books `n` bytes read, unless the kernel no longer knows what it has let through.
fn book(source: Option<&Source>, consumed: &mut u64, n: usize) -> io::Result<usize> {
    if source.is_some_and(|source| source.slot().is_astray()) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel lost track of the stream"));
    }
    *consumed += n as u64;
    Ok(n)
}

#[cfg(test)]
mod tests;
