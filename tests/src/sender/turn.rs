//! One connection of a sender, and the thread whose turn it is to wait for the socket, write, pause, or reap zerocopy completions.

use std::io::{self, ErrorKind, Read as _};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};
use nix::{cmsg_space, setsockopt_impl, sockopt_impl};
use parking_lot::{Mutex, MutexGuard};

use super::message::{Message, Messages};
use super::{Calls, Options, Shared, Waits};

sockopt_impl!(
    /// Whether SO_ZEROCOPY is set, so that `MSG_ZEROCOPY` applies.
    ZeroCopy, SetOnly, libc::SOL_SOCKET, libc::SO_ZEROCOPY, bool
);

/// A sender pauses this long after this many bytes.
const PAUSE: Duration = Duration::from_millis(4);
const BURST: usize = 200_000;
/// No client in these tests blocks a sender for this long.
const STALL: Duration = Duration::from_secs(8);
/// `SO_EE_ORIGIN_ZEROCOPY` (linux/errqueue.h).
const ORIGIN_ZEROCOPY: u8 = 5;

pub(super) struct Turn<'a> {
    stream: &'a TcpStream,
    /// `None`: calls block.
    epoll: Option<Epoll>,
    edge: bool,
    calls: Calls,
    flags: i32,
    shared: &'a Shared,
    /// Calls of this connection with `MSG_ZEROCOPY`, and how many are complete.
    lent: AtomicU64,
    returned: AtomicU64,
}

impl<'a> Turn<'a> {
    pub(super) fn new(stream: &'a TcpStream, options: &Options, shared: &'a Shared) -> io::Result<Self> {
        let (calls, edge) = (options.calls, options.waits == Waits::EdgeTriggered);
        let mut epoll = None;
        if options.waits != Waits::Blocking {
            stream.set_nonblocking(true)?;
            let watched = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            // A level that is of no interest must not wake the thread, so `wait` changes the requested events.
            let flags = if edge { writable() | readable() | EpollFlags::EPOLLET } else { EpollFlags::empty() };
            watched.add(stream, EpollEvent::new(flags, 0))?;
            epoll = Some(watched);
        }
        let flags = if calls == Calls::ZeroCopy {
            set_zerocopy(stream)?;
            libc::MSG_ZEROCOPY
        } else {
            0
        };
        Ok(Self { stream, epoll, edge, calls, flags, shared, lent: AtomicU64::new(0), returned: AtomicU64::new(0) })
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        loop {
            match stream.read(buffer) {
                // Waiting for a request is not a stall.
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(readable(), None)?,
                other => return other,
            };
        }
    }

    /// A pause in which the agent may catch up. An error if the peer leaves meanwhile.
    pub(super) fn pause(&self) -> io::Result<()> {
        let end = Instant::now() + PAUSE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, timeout)? > 0 {
                self.reap()?;
                self.check(fds[0].revents().unwrap_or(PollFlags::empty()))?;
            }
        }
    }

    /// The client sends no request before the last response is complete, so readable data means the end.
    fn check(&self, events: PollFlags) -> io::Result<()> {
        if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP) {
            return Err(ErrorKind::ConnectionReset.into());
        }
        match self.stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Sends the head, a pause, and the body with a pause after each burst.
    pub(super) fn send(&self, messages: &mut Messages) -> io::Result<()> {
        let Messages { head, body, file, .. } = messages;
        self.whole(head, file.as_ref())?;
        self.pause()?;
        let Calls::Turns(threads) = self.calls else {
            let mut burst = 0;
            while let Some(mut message) = body.pop_front() {
                burst += message.len();
                self.whole(&mut message, file.as_ref())?;
                if burst >= BURST && !body.is_empty() {
                    burst = 0;
                    self.pause()?;
                }
            }
            return Ok(());
        };
        let turns = Mutex::new((std::mem::take(body), 0));
        std::thread::scope(|scope| {
            let one = || -> io::Result<()> {
                loop {
                    let mut turn = turns.lock();
                    let (rest, burst) = &mut *turn;
                    let Some(mut message) = rest.pop_front() else { return Ok(()) };
                    *burst += message.len();
                    self.whole(&mut message, None)?;
                    if *burst >= BURST {
                        *burst = 0;
                        self.pause()?;
                    }
                    MutexGuard::unlock_fair(turn);
                }
            };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
            let ends = threads.into_iter().map(|thread| thread.join().expect("a sender's thread panicked"));
            ends.collect::<io::Result<()>>()
        })
    }

    /// Calls until the message is sent.
    fn whole(&self, message: &mut Message, file: Option<&std::fs::File>) -> io::Result<()> {
        while message.len() > 0 {
            match message.send(self.stream, file, self.flags) {
                Ok(()) => {
                    self.shared.sent.fetch_add(1, Ordering::Relaxed);
                    if self.flags != 0 {
                        self.shared.zerocopy.fetch_add(1, Ordering::Relaxed);
                        self.lent.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.shared.refused.fetch_add(1, Ordering::Relaxed);
                    self.wait(writable(), Some(STALL))?;
                }
                // The limit on lent memory is reached (`net.core.optmem_max`).
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.complete()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits until the kernel reports one of these events; an edge is reported once.
    fn wait(&self, wanted: EpollFlags, longest: Option<Duration>) -> io::Result<()> {
        let epoll = self.epoll.as_ref().ok_or(ErrorKind::WouldBlock)?;
        if !self.edge {
            epoll.modify(self.stream, &mut EpollEvent::new(wanted, 0))?;
        }
        let begin = Instant::now();
        let mut events = [EpollEvent::empty()];
        loop {
            let left = longest.map(|longest| longest.saturating_sub(begin.elapsed()));
            let timeout = left.and_then(|left| EpollTimeout::try_from(left).ok()).unwrap_or(EpollTimeout::NONE);
            if epoll.wait(&mut events, timeout)? == 0 {
                self.shared.stalled.fetch_add(1, Ordering::Relaxed);
                return Err(ErrorKind::TimedOut.into());
            }
            if events[0].events().intersects(wanted | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                return Ok(());
            }
        }
    }

    /// Waits for the kernel to release all lent memory.
    pub(super) fn complete(&self) -> io::Result<()> {
        while self.returned.load(Ordering::Relaxed) < self.lent.load(Ordering::Relaxed) {
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(STALL).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, timeout)? == 0 {
                self.shared.stalled.fetch_add(1, Ordering::Relaxed);
                return Err(ErrorKind::TimedOut.into());
            }
            self.reap()?;
            self.check(fds[0].revents().unwrap_or(PollFlags::empty()))?;
        }
        Ok(())
    }

    /// Reads the reported ranges of completed calls.
    fn reap(&self) -> io::Result<()> {
        if self.flags == 0 {
            return Ok(());
        }
        loop {
            let mut space = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
            let received = recvmsg::<()>(
                self.stream.as_raw_fd(),
                &mut [],
                Some(&mut space),
                MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT,
            );
            let message = match received {
                Ok(message) => message,
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            for told in message.cmsgs()? {
                if let ControlMessageOwned::Ipv4RecvErr(told, _) | ControlMessageOwned::Ipv6RecvErr(told, _) = told
                    && told.ee_origin == ORIGIN_ZEROCOPY
                {
                    let calls = u64::from(told.ee_data.wrapping_sub(told.ee_info)) + 1;
                    self.returned.fetch_add(calls, Ordering::Relaxed);
                    self.shared.completed.fetch_add(calls, Ordering::Relaxed);
                }
            }
        }
    }
}

pub fn set_zerocopy(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, ZeroCopy, &true)?)
}

fn writable() -> EpollFlags {
    EpollFlags::EPOLLOUT
}

fn readable() -> EpollFlags {
    EpollFlags::EPOLLIN
}
