//! Addresses that refuse or ignore connections, or expect TLS.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

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

/// The address of a server that answers TLS with an alert and closes every other connection without an answer. It runs as long as
/// the process.
pub fn tls_only() -> Result<SocketAddr> {
    /// A fatal handshake_failure (RFC 8446 §6).
    const ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 40];
    /// The content type of a handshake.
    const HANDSHAKE: u8 = 22;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = listener.local_addr()?;
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut first = [0; 1];
            let mut connection = connection;
            if connection.read_exact(&mut first).is_ok() && first[0] == HANDSHAKE {
                let _ = connection.write_all(&ALERT);
            }
            // Read to the end, so that closing does not reset the connection.
            let _ = connection.shutdown(Shutdown::Write);
            let _ = connection.set_read_timeout(Some(Duration::from_secs(1)));
            let _ = io::copy(&mut connection, &mut io::sink());
        }
    });
    Ok(addr)
}

fn bound() -> Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let addr = socket.local_addr()?.as_socket().context("an IP address")?;
    Ok((socket, addr))
}
