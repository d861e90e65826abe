//! One HTTP/1.1 connection to an endpoint: its socket, its slot if it can be steered, and the count of bytes read.
//!
//! While user space reads, tokio watches the socket for bytes. While the kernel redirects, the socket is watched for errors only
//! ("quiet"), so that segments do not wake the thread; bytes, FIN and the end of the message arrive as events of the slot.

use std::{io, net::SocketAddr, rc::Rc};

use bytes::BytesMut;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use super::{
    crossing,
    local_fault::connect_error,
    sending::Sending,
    timeouts::ConnectionTimeouts,
    tls::{EndpointTls, EndpointWriter},
};
use crate::{
    kernel::{socket, wire::Watched},
    server_tls::session::TlsSession,
    steer::{RegisterError, Source, WorkerSteering, reader::Reader, reason::SteerReason, session::Inlet},
};

/// An HTTP/1.1 connection to an endpoint.
pub struct EndpointConnection {
    // Declared before `source`, so that the socket is closed before the slot is freed.
    io: Io,
    source: Option<Source>,
    /// Set if the endpoint speaks TLS.
    tls: Option<Rc<TlsSession>>,
    /// The [`EndpointTls::id`] of the handshake; 0 without TLS.
    pub(super) tls_id: u64,
    /// The flow of the current response on path `wire`, or the reason why the response takes another path.
    watched: Option<Result<Watched, SteerReason>>,
    /// The address that was dialled.
    pub address: SocketAddr,
    /// Whether the endpoint's address is on this machine.
    pub local: bool,
    /// Bytes that user space has read since the connection was made.
    pub consumed: u64,
    pub(super) idle_since: Instant,
    /// Whether nothing is outstanding on the connection.
    resting: bool,
    /// The current request, which holds the stream until it is sent.
    sending: Option<Sending>,
}

enum Io {
    Ready(Rc<TcpStream>),
    Quiet(AsyncFd<std::net::TcpStream>),
    /// During the change between the two, or after the change failed.
    Gone,
}

fn gone() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl EndpointConnection {
    /// Connects with TLS. The timeout is that of connecting and the handshake together. The kernel programs do not see the socket.
    pub async fn connect_tls(
        address: SocketAddr,
        times: ConnectionTimeouts,
        tls: &EndpointTls,
        receive_buffer: u32,
    ) -> io::Result<Self> {
        let id = tls.id();
        let made = async {
            let untimed = ConnectionTimeouts { connect: None, ..times };
            let mut connection = Self::connect(address, untimed, None, receive_buffer).await?;
            let Io::Ready(stream) = std::mem::replace(&mut connection.io, Io::Gone) else { return Err(gone()) };
            let stream = Rc::into_inner(stream).ok_or_else(gone)?;
            let (stream, session) = tls.connect(stream, address).await?.into_inner();
            (connection.io, connection.tls_id) = (Io::Ready(Rc::new(stream)), id);
            connection.tls = Some(Rc::new(TlsSession::new(session)));
            Ok(connection)
        };
        match times.connect {
            Some(timeout) => tokio::time::timeout(timeout, made).await?,
            None => made.await,
        }
    }

    /// Connects without TLS. Registers the socket with the kernel programs before it connects, and so before anything can arrive
    /// on it.
    pub async fn connect(
        address: SocketAddr,
        times: ConnectionTimeouts,
        steering: Option<&Rc<WorkerSteering>>,
        receive_buffer: u32,
    ) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Bounds the bytes that wait in the socket while a client stalls on the relay path. The kernel doubles the value.
        socket.set_recv_buffer_size(receive_buffer / 2)?;
        socket::detect_unreachable(&socket, times.unreachable)?;
        let unsteered = |error: RegisterError| {
            tracing::debug!(%address, %error, "endpoint connection cannot be steered, relaying it");
        };
        let source = steering.and_then(|steering| steering.announce_source(&socket).map_err(unsteered).ok());
        let connected = match times.connect {
            Some(timeout) => tokio::time::timeout(timeout, socket.connect(address)).await?,
            // The kernel's own timeout, some minutes.
            None => socket.connect(address).await,
        };
        let stream = connected.map_err(|error| connect_error(error, address))?;
        stream.set_nodelay(true)?;
        let local = address.ip().is_loopback() || stream.local_addr()?.ip() == address.ip();
        let source = source.filter(|source| source.insert(&stream).map_err(unsteered).is_ok());
        if source.is_some() {
            // Passed bytes have left the TCP queue, so the kernel would close with a FIN although bytes are unread, and with a
            // closed window. An endpoint that only writes would not notice that for `tcp_fin_timeout`.
            socket::set_reset_on_close(&stream, true);
        }
        let (io, consumed, idle_since) = (Io::Ready(Rc::new(stream)), 0, Instant::now());
        let (resting, sending, watched) = (false, None, None);
        let (tls, tls_id) = (None, 0);
        Ok(Self { io, source, tls, tls_id, watched, address, local, consumed, idle_since, resting, sending })
    }

    /// Whether the endpoint speaks TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The sending side, for a request. It has to be released before the connection becomes quiet or is dropped.
    pub fn writer(&self) -> io::Result<EndpointWriter> {
        Ok(EndpointWriter { tcp: self.stream()?, tls: self.tls.clone() })
    }

    /// The connection as a source of steered bytes; `None` if it cannot be steered.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// Sets the client socket that the next response may be steered to.
    pub fn announce(&self, target: Option<u64>) {
        if let (Some(source), Some(target)) = (&self.source, target) {
            source.announce(target);
        }
    }

    /// Sets the flow of the next response on path `wire`, or the reason why the response takes another path.
    pub fn set_watched(&mut self, watched: Option<Result<Watched, SteerReason>>) {
        self.watched = watched;
    }

    /// Whether the next response may take path `wire`.
    pub fn is_watched(&self) -> bool {
        matches!(self.watched, Some(Ok(_)))
    }

    /// The flow of the next response on path `wire`, or why it takes another path. `None` if the request did not ask for either.
    pub(crate) fn take_watched(&mut self) -> Option<Result<Watched, SteerReason>> {
        self.watched.take()
    }

    fn ready(&self) -> io::Result<&TcpStream> {
        match &self.io {
            Io::Ready(stream) => Ok(stream),
            _ => Err(gone()),
        }
    }

    /// The socket, below TLS if there is any. It has to be released before the connection becomes quiet or is dropped.
    pub fn stream(&self) -> io::Result<Rc<TcpStream>> {
        match &self.io {
            Io::Ready(stream) => Ok(Rc::clone(stream)),
            _ => Err(gone()),
        }
    }

    /// Sets the request that the connection carries. Dropping the connection stops it.
    pub fn set_sending(&mut self, sending: Sending) {
        self.sending = Some(sending);
    }

    /// The current request, if there is one.
    pub fn sending(&self) -> Option<&Sending> {
        self.sending.as_ref()
    }

    /// Whether the request has been sent completely.
    pub fn is_sent(&self) -> bool {
        self.sending.as_ref().is_none_or(Sending::is_sent)
    }

    /// Bytes that the endpoint's kernel has acknowledged since the connection was made, plus one for the SYN. Also known after the
    /// connection broke. Returns `None` if it is unknown.
    pub fn acknowledged(&self) -> Option<u64> {
        match &self.io {
            Io::Ready(stream) => socket::acknowledged(&**stream).ok(),
            Io::Quiet(quiet) => socket::acknowledged(quiet.get_ref()).ok(),
            Io::Gone => None,
        }
    }

    /// Before a request: the value of [`acknowledged`](Self::acknowledged) beyond which a byte of the request has arrived.
    pub fn acknowledged_before(&self) -> Option<u64> {
        match &self.io {
            // The end of the handshake may still be on its way.
            Io::Ready(stream) if self.is_tls() => socket::bytes_written(&**stream).ok(),
            _ => self.acknowledged(),
        }
    }

    /// After the connection has ended: whether the endpoint's kernel has acknowledged more than `before` bytes. Returns `None` if
    /// that is unknown.
    pub async fn acknowledged_more(&self, before: Option<u64>) -> Option<bool> {
        let (Io::Ready(stream), Some(before)) = (&self.io, before) else { return None };
        crossing::decided(|| crossing::look(stream, before)).await
    }

    /// Removes the endpoint's own socket from the map. If it returns false, the connection must not be reused: the endpoint could
    /// notice that its socket was in the map. See [`Source::dismiss`].
    pub fn dismiss(&self) -> bool {
        self.source.as_ref().is_none_or(Source::dismiss)
    }

    /// Makes the close of the connection a reset, unless it is [resting](Self::set_resting) by then: the protocol that it carries
    /// would take a FIN for an orderly close.
    pub fn reset_on_close(&self) {
        if let Ok(stream) = self.ready() {
            socket::set_reset_on_close(stream, true);
        }
    }

    /// Splits the connection to read and write at once.
    pub fn split(&mut self) -> io::Result<(Reader<'_>, &TcpStream)> {
        let Io::Ready(stream) = &self.io else { return Err(gone()) };
        let (source, tls) = (self.source.as_ref(), self.tls.as_deref());
        Ok((Reader { stream, source, tls, consumed: &mut self.consumed }, stream))
    }

    /// Waits for bytes and reads at most the buffer's spare capacity. Returns 0 at the end of the stream. Cancel-safe.
    pub async fn read(&mut self, buf: &mut BytesMut) -> io::Result<usize> {
        self.split()?.0.read(buf).await
    }

    /// Sets whether the last message is complete. If it is not, closing the connection resets it.
    pub fn set_resting(&mut self, resting: bool) {
        self.resting = resting;
    }

    /// Whether bytes or the end of the stream can be read.
    pub fn has_more(&self) -> io::Result<bool> {
        socket::has_more(self.ready()?)
    }

    /// Whether an idle connection is usable: it has received neither its end nor unsolicited bytes.
    pub(super) fn is_alive(&self) -> bool {
        match (&self.tls, &self.io) {
            // Tickets and key updates do not belong to the stream.
            (Some(tls), Io::Ready(stream)) => {
                let nothing = tls.read_now(stream, &mut BytesMut::with_capacity(1));
                nothing.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
            }
            _ => matches!(self.has_more(), Ok(false)),
        }
    }
}

impl Inlet for EndpointConnection {
    fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    fn reader(&mut self) -> io::Result<Reader<'_>> {
        Ok(self.split()?.0)
    }

    fn wait_for_verdict(&self) {
        match &self.io {
            Io::Ready(stream) => socket::wait_for_verdict(&**stream),
            Io::Quiet(quiet) => socket::wait_for_verdict(quiet.get_ref()),
            Io::Gone => {}
        }
    }

    /// Watches the socket for errors only. Fails with `ResourceBusy` while a request is being sent.
    fn quiet(&mut self) -> io::Result<bool> {
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
        Ok(true)
    }

    /// Watches the socket for bytes again.
    fn attentive(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.io, Io::Gone) {
            Io::Quiet(quiet) => self.io = Io::Ready(Rc::new(TcpStream::from_std(quiet.into_inner())?)),
            other => self.io = other,
        }
        Ok(())
    }

    /// Resolves when a quiet connection breaks. Cancel-safe.
    async fn broken(&self) {
        match &self.io {
            Io::Quiet(quiet) => {
                // Without urgent data, priority readiness means an error or a hang-up.
                let _ = quiet.ready(Interest::PRIORITY).await;
            }
            _ => std::future::pending().await,
        }
    }
}

impl Drop for EndpointConnection {
    fn drop(&mut self) {
        // Releases the stream, so that it is closed here and before the slot is freed.
        if let Some(sending) = &self.sending {
            sending.stop();
        }
        // The kernel must not redirect to a client that this connection no longer serves.
        if let Some(source) = &self.source {
            source.leave();
        }
        if self.resting
            && let Ok(stream) = self.ready()
        {
            socket::set_reset_on_close(stream, false);
            if let Some(tls) = &self.tls {
                tls.say_goodbye(stream);
            }
        }
    }
}

#[cfg(test)]
mod tests;
