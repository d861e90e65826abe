//! Socket calls without a safe wrapper: counters of a TCP connection, its cookie, reads that bypass tokio's readiness,
//! and closing by reset.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use bytes::BytesMut;
use nix::sys::socket::{self, MsgFlags};
use socket2::TcpKeepalive;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
};

nix::ioctl_read_bad!(siocoutq, libc::TIOCOUTQ, libc::c_int);
nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);

/// Borrows the descriptor of a type that exposes only a raw one.
pub(super) fn borrow<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: `owner` keeps the descriptor open while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// SO_COOKIE: unique among all sockets until reboot.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    socket2::SockRef::from(&socket.as_fd()).cookie()
}

/// Bytes ever written to the connection, by the agent or the kernel: `tcpi_bytes_acked` plus the queued bytes
/// (SIOCOUTQ), read again until no acknowledgement came between the two. Its growth shows when redirected bytes have
/// reached the socket. Returns `NotConnected` once the connection is gone: a reset empties the queue, so the sum would
/// never match, and a read need not report the reset, because any writer, including the kernel's worker, may take the
/// socket's error (`sock_error`).
pub fn bytes_written(socket: impl AsFd) -> io::Result<u64> {
    let fd = socket.as_fd();
    let mut acked = bytes_acked(fd)?;
    loop {
        let queued = u64::from(send_queue(fd)?);
        let now = bytes_acked(fd)?;
        if now == acked {
            return Ok(acked + queued);
        }
        acked = now;
    }
}

/// Returns when no verdict of this connection is in progress. Reading TCP_INFO takes the lock under which verdicts run
/// (`tcp_get_info`) and, unlike a read, does not consume the socket's error.
pub fn wait_for_verdict(socket: impl AsFd) {
    let _ = bytes_written(socket);
}

/// Bytes that the peer's kernel has acknowledged (`tcpi_bytes_acked`), plus one for the SYN of an outgoing connection.
/// Works for a broken connection too. A reset acknowledges nothing, not even bytes that the peer has read.
pub fn acknowledged(socket: impl AsFd) -> io::Result<u64> {
    Ok(tcp_info(socket.as_fd())?.tcpi_bytes_acked)
}

/// Like [`acknowledged`], but returns `NotConnected` once the connection is gone.
pub fn bytes_acked(socket: impl AsFd) -> io::Result<u64> {
    Ok(open_tcp_info(socket.as_fd())?.tcpi_bytes_acked)
}

/// Time since the peer's last acknowledgement, while the kernel retransmits or probes a closed window; otherwise
/// `None`. Returns `NotConnected` once the connection is gone.
pub fn unanswered(socket: impl AsFd) -> io::Result<Option<Duration>> {
    let info = open_tcp_info(socket.as_fd())?;
    let repeats = info.tcpi_unacked > 0 && info.tcpi_retransmits > 0 || info.tcpi_probes > 0;
    Ok(repeats.then(|| Duration::from_millis(info.tcpi_last_ack_recv.into())))
}

/// Whether the peer has closed its side, and the connection is otherwise open.
pub fn is_half_closed(socket: impl AsFd) -> bool {
    const TCP_CLOSE_WAIT: u8 = 8;
    tcp_info(socket.as_fd()).is_ok_and(|info| info.tcpi_state == TCP_CLOSE_WAIT)
}

/// Returns `NotConnected` once the connection is gone.
fn open_tcp_info(fd: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    const TCP_CLOSE: u8 = 7;
    let info = tcp_info(fd)?;
    if info.tcpi_state == TCP_CLOSE { Err(io::ErrorKind::NotConnected.into()) } else { Ok(info) }
}

pub(super) fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: tcp_info consists of integers; the kernel fills at most `len` bytes of it.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: pointers to locals of the given sizes.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info)
}

/// Bytes in the send queue, sent or not, that the peer has not acknowledged (SIOCOUTQ).
pub fn send_queue(socket: impl AsFd) -> io::Result<u32> {
    let mut queued: libc::c_int = 0;
    // SAFETY: the ioctl writes one int to the pointer.
    unsafe { siocoutq(socket.as_fd().as_raw_fd(), &raw mut queued) }?;
    Ok(queued.max(0) as u32)
}

/// Bytes waiting to be read (FIONREAD).
pub fn receive_queue(socket: impl AsFd) -> io::Result<u32> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: the ioctl writes one int to the pointer.
    unsafe { fionread(socket.as_fd().as_raw_fd(), &raw mut waiting) }?;
    Ok(waiting.max(0) as u32)
}

/// Reads available bytes. `Ok(0)` is the end of the stream, `WouldBlock` means that nothing is available.
pub fn receive(socket: impl AsFd, buf: &mut [u8]) -> io::Result<usize> {
    Ok(socket::recv(socket.as_fd().as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT)?)
}

/// Reads available bytes into the buffer's spare capacity, which must not be empty. `Ok(0)` is the end of the stream,
/// `WouldBlock` means that nothing is available. The call takes the socket lock, so it waits for a running verdict
/// (`tcp_bpf_recvmsg_parser`).
pub fn receive_into(socket: impl AsFd, buf: &mut BytesMut) -> io::Result<usize> {
    let spare = buf.spare_capacity_mut();
    debug_assert!(!spare.is_empty());
    // SAFETY: the kernel writes at most `spare.len()` bytes to the buffer's own memory.
    let n =
        unsafe { libc::recv(socket.as_fd().as_raw_fd(), spare.as_mut_ptr().cast(), spare.len(), libc::MSG_DONTWAIT) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has initialised the next `n` bytes.
    unsafe { buf.set_len(buf.len() + n) };
    Ok(n)
}

/// Writes all of `buf` through a shared reference. Not cancel-safe.
pub async fn write_all(stream: &TcpStream, mut buf: &[u8]) -> io::Result<()> {
    while !buf.is_empty() {
        stream.writable().await?;
        match stream.try_write(buf) {
            Ok(n) => buf = &buf[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the kernel break the connection with `TimedOut` if the peer has been unreachable for `after`: it acknowledges
/// nothing of what was sent, or answers no keepalive probe of an idle connection. A peer that takes no byte for that
/// long also counts as unreachable (TCP_USER_TIMEOUT). `None` keeps the machine's settings, which take hours.
pub fn detect_unreachable(socket: impl AsFd, after: Option<Duration>) -> io::Result<()> {
    probe_when_idle(&socket, after)?;
    match after {
        Some(after) => socket2::SockRef::from(&socket.as_fd()).set_tcp_user_timeout(Some(after)),
        None => Ok(()),
    }
}

/// The part of [`detect_unreachable`] for idle connections; a present peer may take nothing for any time.
pub fn probe_when_idle(socket: impl AsFd, after: Option<Duration>) -> io::Result<()> {
    let Some(after) = after else { return Ok(()) };
    const SECOND: Duration = Duration::from_secs(1);
    let probes =
        TcpKeepalive::new().with_time((after / 2).max(SECOND)).with_interval((after / 8).max(SECOND)).with_retries(4);
    socket2::SockRef::from(&socket.as_fd()).set_tcp_keepalive(&probes)
}

/// Limits the time between two probes of a closed window, and between two retransmissions, to an eighth of `after`; by default it
/// grows to two minutes (TCP_RTO_MAX_MS). Fails on kernels before 6.15.
pub fn probe_often(socket: impl AsFd, after: Option<Duration>) -> io::Result<()> {
    const TCP_RTO_MAX_MS: libc::c_int = 44;
    /// What the kernel takes, in milliseconds.
    const RANGE: std::ops::RangeInclusive<u128> = 1000..=120_000;
    let Some(after) = after else { return Ok(()) };
    let gap = (after / 8).as_millis().clamp(*RANGE.start(), *RANGE.end()) as libc::c_int;
    // SAFETY: a pointer to a local int, and its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MAX_MS,
            (&raw const gap).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Drops every new SYN to a listener; handshakes in progress complete. The filter sees the TCP header, and accepted
/// connections inherit it.
pub fn refuse_handshakes(listener: impl AsFd) -> io::Result<()> {
    const FLAGS: u32 = 13;
    const SYN: u32 = 2;
    let instruction = |code: u32, jt, jf, k| socket2::SockFilter::new(code as u16, jt, jf, k);
    socket2::SockRef::from(&listener.as_fd()).attach_filter(&[
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, FLAGS),
        instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, SYN),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ])
}

/// Closes the sending side of a connection.
pub fn shut_down(socket: impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(&socket.as_fd()).shutdown(std::net::Shutdown::Write)
}

/// Reads available bytes without taking them; results as in [`receive_into`].
pub fn peek(socket: impl AsFd, buf: &mut [u8]) -> io::Result<usize> {
    Ok(socket::recv(socket.as_fd().as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK)?)
}

/// Whether bytes or the end of the stream can be read. Returns and thereby clears a pending error of the connection.
pub fn has_more(socket: impl AsFd) -> io::Result<bool> {
    match peek(socket, &mut [0]) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Registers a connection with the runtime so that only errors and hang-ups wake its waiters: it asks only for urgent
/// data, which HTTP does not use, and errors are always reported.
pub fn watch_errors(stream: std::net::TcpStream) -> io::Result<AsyncFd<std::net::TcpStream>> {
    // SAFETY: a TcpStream keeps its descriptor until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(stream, Interest::PRIORITY) }?)
}

/// Ends a connection by reset and leaves the descriptor open (`tcp_disconnect`).
pub fn disconnect(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: a sockaddr consists of integers, for which zero is valid.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: a pointer to a local of the given size.
    let result = unsafe { libc::connect(socket.as_fd().as_raw_fd(), &raw const nowhere, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets whether close sends RST, so that the peer cannot mistake it for the end of a message.
pub fn set_reset_on_close(socket: impl AsFd, reset: bool) {
    // A socket that is already dead cannot be reset.
    let _ = socket2::SockRef::from(&socket.as_fd()).set_linger(reset.then_some(Duration::ZERO));
}

/// Makes the socket accept whatever fits into its send buffer, independent of the machine's `tcp_notsent_lowat`,
/// because redirects are decided by that space.
pub fn take_all_that_fits(socket: impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(&socket.as_fd()).set_tcp_notsent_lowat(i32::MAX as u32)
}

/// Marks a socket, or the connections that a listener accepts, whose owner keeps an account of its queue, so that no
/// Penstock's message program bypasses it. The mark is SO_RXQ_OVFL, which has no meaning for TCP.
pub fn keep_account(socket: impl AsFd) -> io::Result<()> {
    Ok(socket::setsockopt(&socket.as_fd(), socket::sockopt::RxqOvfl, &1)?)
}

/// Sets SO_SNDBUF, beyond `net.core.wmem_max` if permitted. The kernel doubles the value for its own overhead. Accepted
/// connections inherit a listener's size.
pub fn set_send_buffer(socket: impl AsFd, bytes: u32) -> io::Result<()> {
    let value = bytes as libc::c_int / 2;
    if socket2::SockRef::from(&socket.as_fd()).send_buffer_size()? == value as usize * 2 {
        return Ok(());
    }
    socket::setsockopt(&socket.as_fd(), socket::sockopt::SndBufForce, &(value as usize))
        .or_else(|_| socket::setsockopt(&socket.as_fd(), socket::sockopt::SndBuf, &(value as usize)))?;
    Ok(())
}

/// Whether a socket of this thread can get a send buffer of this size.
pub fn may_have_send_buffer(bytes: u32) -> io::Result<bool> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    set_send_buffer(&socket, bytes)?;
    Ok(socket.send_buffer_size()? >= bytes as usize / 2 * 2)
}

/// CLOCK_MONOTONIC in ns, the clock of the kernel programs' stamps.
pub fn monotonic_ns() -> u64 {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[cfg(test)]
mod tests;
