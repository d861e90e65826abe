//! Addresses where no connection comes about.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

/// One that nobody listens on, for as long as this lives: it is bound, so that no other test gets the port.
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

/// One that neither accepts nor refuses: its queue is full, and the kernel drops whatever knocks.
pub struct Deaf {
    pub addr: SocketAddr,
    _socket: Socket,
    _queued: TcpStream,
}

impl Deaf {
    pub fn new() -> Result<Self> {
        let (socket, addr) = bound()?;
        socket.listen(0)?;
        // A queue of no length holds one.
        Ok(Self { addr, _socket: socket, _queued: TcpStream::connect(addr)? })
    }
}

fn bound() -> Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let addr = socket.local_addr()?.as_socket().context("an IP address")?;
    Ok((socket, addr))
}
