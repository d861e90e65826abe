//! File descriptors that come from outside: sent over a Unix socket (SCM_RIGHTS), or inherited from the program that started this one.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::TcpListener,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{
        self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockType, SockaddrLike as _,
        SockaddrStorage, sockopt,
    },
};

/// Maximum number of descriptors that one receive takes.
const AT_ONCE: usize = 4;

/// Sends bytes, which must not be empty, with a descriptor. Returns the number of bytes sent.
pub fn send(stream: impl AsFd, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let stream = stream.as_fd().as_raw_fd();
    Ok(socket::sendmsg::<()>(stream, &[IoSlice::new(bytes)], &control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Receives bytes, and appends the descriptors that came with them. Returns the number of bytes, 0 at the end.
pub fn receive(stream: impl AsFd, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = cmsg_space!([RawFd; AT_ONCE]);
    let mut parts = [IoSliceMut::new(bytes)];
    let stream = stream.as_fd().as_raw_fd();
    let received = socket::recvmsg::<()>(stream, &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let is_cut = received.flags.contains(MsgFlags::MSG_CTRUNC);
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(passed) = message {
            // SAFETY: the kernel has just opened these descriptors for this process, and nothing else knows them.
            fds.extend(passed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if is_cut {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors arrived than were expected"));
    }
    Ok(received.bytes)
}

/// Takes over `count` descriptors from `first` on, which the starting program has opened for this one, and marks them close-on-exec.
/// Must be called once, before this process opens any.
pub fn inherited(first: RawFd, count: usize) -> io::Result<Vec<OwnedFd>> {
    let numbers = (first..).take(count);
    let open = numbers.map(|fd| {
        // SAFETY: descriptors below `first + count` were opened by the starting program, and nothing in this process uses them.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        // SAFETY: as above, and fcntl has shown that it is open.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    });
    open.collect()
}

/// The descriptor as a TCP socket that listens. The error says what it is instead.
pub fn listener(fd: OwnedFd) -> Result<TcpListener, String> {
    let kind = socket::getsockopt(&fd, sockopt::SockType).map_err(|error| format!("not a socket: {error}"))?;
    let address: SockaddrStorage = socket::getsockname(fd.as_raw_fd()).map_err(|error| error.to_string())?;
    match (kind, address.family()) {
        (SockType::Stream, Some(AddressFamily::Inet | AddressFamily::Inet6)) => {}
        (kind, family) => return Err(format!("a socket of type {kind:?} and family {family:?}, not a TCP socket")),
    }
    if !socket::getsockopt(&fd, sockopt::AcceptConn).map_err(|error| error.to_string())? {
        return Err("a TCP socket that does not listen".to_owned());
    }
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn listening_socket_passes_between_sockets() {
        let (here, there) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(send(&here, b"one", listener.as_fd()).unwrap(), 3);
        let (mut bytes, mut fds) = ([0; 16], Vec::new());
        assert_eq!(receive(&there, &mut bytes, &mut fds).unwrap(), 3);
        let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
        let passed = super::listener(fd).unwrap();
        assert_eq!(passed.local_addr().unwrap(), listener.local_addr().unwrap());
        // The connection arrives at whichever accepts.
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(listener);
        passed.accept().unwrap();
    }

    #[test]
    fn excess_descriptors_are_refused_and_closed() {
        let (here, there) = UnixStream::pair().unwrap();
        let fds = [here.as_raw_fd(); 3 * AT_ONCE];
        let control = [ControlMessage::ScmRights(&fds)];
        socket::sendmsg::<()>(here.as_raw_fd(), &[IoSlice::new(b"x")], &control, MsgFlags::empty(), None).unwrap();
        let mut fds = Vec::new();
        assert!(receive(&there, &mut [0; 4], &mut fds).is_err());
        assert!(fds.len() <= AT_ONCE + 1);
    }

    #[test]
    fn anything_but_a_listening_tcp_socket_is_refused() {
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(listener(file).unwrap_err().contains("not a socket"));
        let datagrams: OwnedFd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        assert!(listener(datagrams).unwrap_err().contains("not a TCP socket"));
        let (unix, _) = UnixStream::pair().unwrap();
        assert!(listener(unix.into()).unwrap_err().contains("not a TCP socket"));
        let open = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = std::net::TcpStream::connect(open.local_addr().unwrap()).unwrap();
        assert!(listener(connected.into()).unwrap_err().contains("does not listen"));
    }
}
