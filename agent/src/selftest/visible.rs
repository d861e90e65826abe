//! Checks whether the owner of a socket in the message program's map can observe that: makes the calls that query
//! waiting bytes on such a socket.
//!
//! The tests of `agent/src/kernel/transparent.rs` compare many more calls. These are the ones that known kernels answer
//! wrongly: from 929e30f93125 until 04af4efde58a, FIONREAD reports 0.

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
/// Loopback takes microseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Describes the first difference; `None` if there is none.
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
            ensure!(begun.elapsed() < PATIENCE, "the bytes did not arrive");
        }
        let waiting = socket::receive_queue(&server)?;
        if waiting as usize != BYTES {
            return Ok(Some(format!("FIONREAD reports {waiting} of {BYTES} waiting bytes").into()));
        }
        ensure!(server.read(&mut buffer)? == BYTES, "short read");
        ensure!(socket::receive_queue(&server)? == 0, "FIONREAD reports bytes that were already read");
    }
    ensure!(SockRef::from(&server).take_error()?.is_none() && server.read(&mut buffer)? == 0, "no end of stream");
    Ok(None)
}
