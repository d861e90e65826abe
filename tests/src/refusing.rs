//! Addresses that refuse or ignore connections.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

/// An address that refuses connections while this exists: it is bound, so that no other test gets the port.
pub struct Refusing {
    pub addr: SocketAddr,
    _socket: Socket,
}

impl Refusing {
    pub fn new() -> Result<Self> {
        let (socket, addr) = bound()?;
        Ok(Self { addr, _socket: socket })
    }
}

/// An address that neither accepts nor refuses: its queue is full, and the kernel drops further SYNs.
pub struct Deaf {
    pub addr: SocketAddr,
    _socket: Socket,
    _queued: TcpStream,
}

impl Deaf {
    pub fn new() -> Result<Self> {
        let (socket, addr) = bound()?;
        socket.listen(0)?;
        // A backlog of 0 holds one connection.
        Ok(Self { addr, _socket: socket, _queued: TcpStream::connect(addr)? })
    }
}

fn bound() -> Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let addr = socket.local_addr()?.as_socket().context("an IP address")?;
    Ok((socket, addr))
}
