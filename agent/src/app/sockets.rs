//! The agent's listening sockets: all are bound before anything else can fail, and listen when nothing can.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use anyhow::{Context as _, Result};

use crate::{config::Listen, kernel::socket, listeners::Listeners, tls::Acceptor};

/// Accept backlog of each listener, in connections.
const BACKLOG: i32 = 4096;

/// The sockets for clients, one of each kind per worker.
pub(super) struct Sockets {
    plain: Vec<TcpListener>,
    secured: Option<Vec<TcpListener>>,
}

/// A worker's socket, with the acceptor if it speaks TLS.
pub(super) type WorkerListener = (TcpListener, Option<Acceptor>);

impl Sockets {
    /// Binds the sockets of `count` workers.
    pub(super) fn bind(listen: &Listen, count: usize) -> Result<Self> {
        let bind = |address| bind(address, count).with_context(|| format!("cannot listen on {address}"));
        let plain = bind(listen.address)?;
        let secured = listen.tls.as_ref().map(|tls| bind(tls.address)).transpose()?;
        Ok(Self { plain, secured })
    }

    /// The addresses of the agent, with the ports that were bound.
    pub(super) fn own(&self, admin: &TcpListener) -> io::Result<Listeners> {
        let mut bound = vec![self.address()?, admin.local_addr()?];
        bound.extend(self.tls_address()?);
        Ok(Listeners::new(bound))
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.plain[0].local_addr()
    }

    pub(super) fn tls_address(&self) -> io::Result<Option<SocketAddr>> {
        self.secured.as_ref().map(|secured| secured[0].local_addr()).transpose()
    }

    /// Sets the send buffer that accepted connections inherit, so that workers do not need a capability to set it.
    pub(super) fn set_send_buffer(&self, bytes: u32) -> io::Result<()> {
        self.plain.iter().try_for_each(|listener| socket::set_send_buffer(listener, bytes))
    }

    /// Lets accepted connections inherit the account of their bytes. If such a connection comes from another agent on this machine,
    /// that agent knows from the start that its endpoint is an agent.
    pub(super) fn keep_account(&self) -> io::Result<()> {
        self.plain.iter().try_for_each(socket::keep_account)
    }

    /// Begins to listen, and returns the sockets of each worker.
    pub(super) fn listen(self, acceptor: Option<&Acceptor>) -> io::Result<Vec<Vec<WorkerListener>>> {
        let mut listeners: Vec<Vec<_>> = self.plain.into_iter().map(|socket| vec![(socket, None)]).collect();
        if let (Some(secured), Some(acceptor)) = (self.secured, acceptor) {
            for (worker, socket) in listeners.iter_mut().zip(secured) {
                worker.push((socket, Some(acceptor.clone())));
            }
        }
        for (socket, _) in listeners.iter().flatten() {
            socket2::SockRef::from(socket).listen(BACKLOG)?;
        }
        Ok(listeners)
    }
}

/// Binds the socket of the admin server.
pub(super) fn bind_admin(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("cannot start the admin server on {address}"))
}

/// Binds a socket for each worker to the same address (SO_REUSEPORT). They do not listen yet: a listening socket gets a share of
/// the connections, and resets them if the start fails afterwards.
fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    if is_shared(address) {
        tracing::warn!(%address, "another process listens on this address, too, and gets a share of the connections");
    }
    let mut listeners: Vec<TcpListener> = Vec::with_capacity(count);
    for _ in 0..count {
        // Port 0 is resolved by the first listener.
        let address = listeners.first().map_or(Ok(address), TcpListener::local_addr)?;
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// Whether another process listens on the address.
fn is_shared(address: SocketAddr) -> bool {
    let alone = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    address.port() != 0 && alone().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse)
}
