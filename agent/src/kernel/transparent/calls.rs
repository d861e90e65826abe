//! A server's socket calls, with a log of their results.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use libc::c_int;
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
};
use socket2::Socket;

use crate::kernel::socket;

/// Loopback takes microseconds, an emulated processor milliseconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes sent per sending call.
const PIECE: usize = 10_000;
/// Bytes of a response, which [`Server::respond`] sends.
pub(super) const RESPONSE: usize = 9 * PIECE;

pub(super) fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]).collect()
}

pub(super) struct Server {
    socket: Option<Socket>,
    edges: Epoll,
    levels: Epoll,
    log: Vec<String>,
    /// Bytes of the response sent so far.
    sent: usize,
}

/// The result of a call, or its error.
fn outcome(result: isize) -> String {
    if result < 0 { format!("{:?}", io::Error::last_os_error().raw_os_error()) } else { result.to_string() }
}

pub(super) fn option(socket: impl AsFd, level: c_int, name: c_int, value: c_int) -> isize {
    let size = size_of::<c_int>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one int from the pointer.
    unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), size) as isize }
}

fn get_option(socket: impl AsFd, level: c_int, name: c_int) -> c_int {
    let (mut value, mut size): (c_int, _) = (-1, size_of::<c_int>() as libc::socklen_t);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes one int to the pointer.
    unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut size) };
    value
}

pub(super) fn fast_open(listener: &Socket) {
    option(listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 16);
}

pub(super) fn zerocopy(server: &Server) {
    assert_eq!(option(server.socket(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1), 0);
}

pub(super) fn set_nonblocking(server: &Server, nonblocking: bool) {
    socket2::SockRef::from(&server.socket()).set_nonblocking(nonblocking).unwrap();
}

pub(super) fn stamps(server: &Server) {
    let flags = libc::SOF_TIMESTAMPING_TX_ACK | libc::SOF_TIMESTAMPING_SOFTWARE;
    assert_eq!(option(server.socket(), libc::SOL_SOCKET, libc::SO_TIMESTAMPING, flags as c_int), 0);
}

impl Server {
    pub(super) fn new(socket: Socket) -> Self {
        let make = |flags: EpollFlags| {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
            let flags = flags | EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP;
            epoll.add(&socket, EpollEvent::new(flags, 1)).unwrap();
            epoll
        };
        socket.set_tcp_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let (edges, levels) = (make(EpollFlags::EPOLLET), make(EpollFlags::empty()));
        Self { edges, levels, socket: Some(socket), log: Vec::new(), sent: 0 }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("open").as_fd()
    }

    fn fd(&self) -> c_int {
        self.socket().as_raw_fd()
    }

    pub(super) fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    pub(super) fn note(&mut self, what: String) {
        self.log.push(what);
    }

    fn call(&mut self, name: &str, result: isize) {
        let outcome = outcome(result);
        self.note(format!("{name} returns {outcome}"));
    }

    fn recv(&self, buffer: &mut [u8], flags: c_int) -> isize {
        // SAFETY: the kernel writes at most the buffer's length to it.
        unsafe { libc::recv(self.fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) }
    }

    /// Waits until `bytes` can be read.
    pub(super) fn arrived(&self, bytes: usize) {
        let (begun, mut buffer) = (Instant::now(), vec![0; bytes + 1]);
        while self.recv(&mut buffer, libc::MSG_PEEK | libc::MSG_DONTWAIT) < bytes as isize {
            assert!(begun.elapsed() < PATIENCE, "the bytes did not arrive");
        }
    }

    /// Waits until the client has closed its side or reset.
    pub(super) fn ended(&self) {
        let mut fds = [PollFd::new(self.socket(), PollFlags::from_bits_retain(libc::POLLRDHUP))];
        assert_eq!(poll(&mut fds, u16::MAX), Ok(1));
    }

    /// Waits until the client has acknowledged everything.
    pub(super) fn acknowledged(&self) {
        let begun = Instant::now();
        while socket::send_queue(self.socket()).unwrap() > 0 {
            assert!(begun.elapsed() < PATIENCE, "the response was not acknowledged");
        }
    }

    /// Makes every call that only queries state.
    pub(super) fn look(&mut self, when: &str) {
        self.note(format!("-- {when}"));
        let (waiting, queued) = (socket::receive_queue(self.socket()), socket::send_queue(self.socket()));
        self.note(format!("FIONREAD {waiting:?}, SIOCOUTQ {queued:?}"));
        let mut buffer = [0; 4096];
        let peeked = self.recv(&mut buffer, libc::MSG_PEEK | libc::MSG_DONTWAIT);
        self.call("a peek", peeked);
        let mut fds = [PollFd::new(self.socket(), PollFlags::all())];
        poll(&mut fds, 0u8).unwrap();
        let polled = fds[0].revents();
        self.note(format!("poll {polled:?}"));
        let seen = [&self.edges, &self.levels].map(|epoll| {
            let mut events = [EpollEvent::empty()];
            let count = epoll.wait(&mut events, 0u8).unwrap();
            (count, events[0].events())
        });
        self.note(format!("epoll {seen:?}"));
        let error = get_option(self.socket(), libc::SOL_SOCKET, libc::SO_ERROR);
        let low = get_option(self.socket(), libc::SOL_SOCKET, libc::SO_RCVLOWAT);
        let (received, acked, state) = counters(self.socket());
        self.note(format!("SO_ERROR {error}, SO_RCVLOWAT {low}, received {received}, acked {acked}, state {state}"));
    }

    pub(super) fn receive(&mut self, bytes: usize, flags: c_int) {
        let mut buffer = vec![0; bytes];
        let received = self.recv(&mut buffer, flags);
        self.call(&format!("recv({bytes}, {flags:#x})"), received);
        let discards = flags & libc::MSG_TRUNC != 0;
        if received > 0 && !discards {
            self.note(format!("{:?}", &buffer[..received as usize]));
        }
    }

    /// With SO_RCVLOWAT above the available bytes, poll reports nothing.
    pub(super) fn low_water(&mut self, bytes: usize) {
        for low in [bytes as c_int + 1, bytes as c_int, 1] {
            option(self.socket(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, low);
            self.look("SO_RCVLOWAT");
        }
        self.receive(bytes, 0);
    }

    pub(super) fn many_messages(&mut self, bytes: usize) {
        let mut buffers = [vec![0u8; bytes / 2], vec![0u8; bytes - bytes / 2]];
        let mut vectors = buffers
            .each_mut()
            .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        let mut messages = vectors.each_mut().map(|vector| {
            // SAFETY: plain integers and pointers, for which zero is valid.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (vector, 1);
            message
        });
        // SAFETY: the messages describe the buffers above, which outlive the call.
        let received =
            unsafe { libc::recvmmsg(self.fd(), messages.as_mut_ptr(), 2, libc::MSG_WAITFORONE, std::ptr::null_mut()) };
        let lengths = messages.map(|message| message.msg_len);
        self.call("recvmmsg", received as isize);
        self.note(format!("{lengths:?} {buffers:?}"));
    }

    pub(super) fn splice_out(&mut self, bytes: usize) {
        let (from, to) = nix::unistd::pipe().unwrap();
        // SAFETY: open descriptors and no offsets.
        let moved = unsafe {
            let null = std::ptr::null_mut();
            libc::splice(self.fd(), null, to.as_raw_fd(), null, bytes, libc::SPLICE_F_NONBLOCK)
        };
        self.call("splice from the socket", moved);
        let mut buffer = vec![0; bytes];
        let read = nix::unistd::read(&from, &mut buffer);
        self.note(format!("{read:?} {buffer:?}"));
    }

    pub(super) fn send(&mut self, bytes: usize, flags: c_int) {
        let piece = pattern(self.sent, bytes);
        // SAFETY: the kernel reads at most the buffer's length from it.
        let sent = unsafe { libc::send(self.fd(), piece.as_ptr().cast(), piece.len(), flags) };
        self.call(&format!("send({bytes}, {flags:#x})"), sent);
        self.sent += sent.max(0) as usize;
    }

    /// Sends [`RESPONSE`] bytes with nine calls.
    pub(super) fn respond(&mut self) {
        self.sent = 0;
        self.send(PIECE, 0);
        self.send(PIECE, libc::MSG_MORE);
        self.send(PIECE, libc::MSG_DONTWAIT);
        option(self.socket(), libc::IPPROTO_TCP, libc::TCP_CORK, 1);
        self.send(PIECE, 0);
        option(self.socket(), libc::IPPROTO_TCP, libc::TCP_CORK, 0);
        self.send_file();
        self.splice_in();
        self.vectored();
        self.many_at_once();
        super::uring::sends(self, PIECE);
        assert_eq!(self.sent, RESPONSE);
    }

    fn send_file(&mut self) {
        // SAFETY: creates a descriptor; the name is nul-terminated.
        let file = unsafe { libc::memfd_create(c"response".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(file >= 0);
        // SAFETY: the descriptor has just been created, and nothing else owns it.
        let mut file = unsafe { File::from_raw_fd(file) };
        file.write_all(&pattern(self.sent, PIECE)).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        // SAFETY: open descriptors and no offset.
        let sent = unsafe { libc::sendfile(self.fd(), file.as_raw_fd(), std::ptr::null_mut(), PIECE) };
        self.call("sendfile", sent);
        self.sent += sent.max(0) as usize;
    }

    fn splice_in(&mut self) {
        let (from, to): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&to, &pattern(self.sent, PIECE)).unwrap();
        let mut left = PIECE;
        while left > 0 {
            let null = std::ptr::null_mut();
            // SAFETY: open descriptors and no offsets.
            let moved = unsafe { libc::splice(from.as_raw_fd(), null, self.fd(), null, left, 0) };
            assert!(moved > 0, "{}", io::Error::last_os_error());
            left -= moved as usize;
        }
        self.note("splice into the socket".to_owned());
        self.sent += PIECE;
    }

    fn vectored(&mut self) {
        let piece = pattern(self.sent, PIECE);
        let vectors: Vec<libc::iovec> = piece
            .chunks(1000)
            .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
            .collect();
        // SAFETY: the vectors describe parts of `piece`, which the kernel only reads.
        let sent = unsafe { libc::writev(self.fd(), vectors.as_ptr(), vectors.len() as c_int) };
        self.call("writev", sent);
        self.sent += sent.max(0) as usize;
    }

    fn many_at_once(&mut self) {
        let piece = pattern(self.sent, PIECE);
        let mut vectors = [&piece[..4000], &piece[4000..]]
            .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
        let mut messages = vectors.each_mut().map(|vector| {
            // SAFETY: plain integers and pointers, for which zero is valid.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (vector, 1);
            message
        });
        // SAFETY: the messages describe parts of `piece`, which the kernel only reads.
        let sent = unsafe { libc::sendmmsg(self.fd(), messages.as_mut_ptr(), 2, 0) };
        self.call("sendmmsg", sent as isize);
        self.note(format!("{:?}", messages.map(|message| message.msg_len)));
        self.sent += PIECE;
    }

    /// Sets options and reads them back.
    pub(super) fn options(&mut self) {
        let options = [
            ("SO_KEEPALIVE", libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            ("TCP_KEEPIDLE", libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 30),
            ("TCP_USER_TIMEOUT", libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 5000),
            ("TCP_NOTSENT_LOWAT", libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 4096),
            ("TCP_QUICKACK", libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1),
            ("SO_SNDBUF", libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000),
            ("SO_RCVBUF", libc::SOL_SOCKET, libc::SO_RCVBUF, 50_000),
            ("TCP_FASTOPEN", libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 1),
        ];
        for (name, level, option_name, value) in options {
            let set = option(self.socket(), level, option_name, value);
            self.call(name, set);
            let now = get_option(self.socket(), level, option_name);
            self.note(format!("{name} is {now}"));
        }
    }

    /// Passes the socket through a Unix socket to this process and queries the new descriptor.
    pub(super) fn passed_on(&mut self) {
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let (mut byte, mut control) = ([0u8], [0u64; 4]);
        let mut vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        // SAFETY: the message describes locals that outlive both calls. The control buffer has room for one descriptor,
        // and the macros compute addresses inside it.
        let passed = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_iov, message.msg_iovlen) = (&raw mut vector, 1);
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(size_of::<c_int>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            ((*header).cmsg_level, (*header).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<c_int>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<c_int>().write_unaligned(self.fd());
            assert_eq!(libc::sendmsg(here.as_raw_fd(), &raw const message, 0), 1);
            assert_eq!(libc::recvmsg(there.as_raw_fd(), &raw mut message, 0), 1);
            OwnedFd::from_raw_fd(
                libc::CMSG_DATA(libc::CMSG_FIRSTHDR(&raw const message)).cast::<c_int>().read_unaligned(),
            )
        };
        let waiting = (socket::receive_queue(&passed), socket::send_queue(&passed));
        self.note(format!("through another descriptor: {waiting:?}"));
    }

    pub(super) fn shut_down(&mut self, how: c_int) {
        // SAFETY: the call accesses no memory of this process.
        let result = unsafe { libc::shutdown(self.fd(), how) };
        self.call(&format!("shutdown({how})"), result as isize);
    }

    pub(super) fn close(&mut self) {
        self.socket = None;
        self.note("closed".to_owned());
    }

    pub(super) fn add_sent(&mut self, bytes: usize) {
        self.sent += bytes;
    }

    pub(super) fn sent(&self) -> usize {
        self.sent
    }
}

/// `tcpi_bytes_received`, `tcpi_bytes_acked` and `tcpi_state`.
fn counters(socket: impl AsFd) -> (u64, u64, u8) {
    // SAFETY: plain integers, for which zero is valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `size` bytes to the pointer.
    unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut size) };
    (info.tcpi_bytes_received, info.tcpi_bytes_acked, info.tcpi_state)
}
