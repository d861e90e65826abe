//! Whether the owner of a socket in the message program's map can tell: the calls that ask about what waits on a socket, on one
//! that is in the map.
//!
//! `tests/tests/local/transparent.rs` compares many more. Those here are the ones that known kernels answer wrongly: since
//! 929e30f93125 and until 04af4efde58a, FIONREAD says 0.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use socket2::SockRef;

use crate::kernel::{Kernel, socket};

const BYTES: usize = 195;
/// Loopback takes some microseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// The first difference, or `None`.
pub fn how_visible(kernel: &mut Kernel) -> Result<Option<Arc<str>>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    kernel.map_as_endpoint(&server)?;
    let mut buffer = [0; 2 * BYTES];
    for end in [false, true] {
        client.write_all(&[7; BYTES])?;
        if end {
            client.shutdown(Shutdown::Write)?;
        }
        let begun = Instant::now();
        while server.peek(&mut buffer)? < BYTES {
            ensure!(begun.elapsed() < PATIENCE, "the bytes do not arrive");
        }
        let waiting = socket::receive_queue(&server)?;
        if waiting as usize != BYTES {
            return Ok(Some(format!("FIONREAD says {waiting} where {BYTES} bytes wait").into()));
        }
        ensure!(server.read(&mut buffer)? == BYTES, "a read that is short");
        ensure!(socket::receive_queue(&server)? == 0, "FIONREAD says that bytes wait that have been read");
    }
    ensure!(SockRef::from(&server).take_error()?.is_none() && server.read(&mut buffer)? == 0, "no end");
    Ok(None)
}
