//! Events of the kernel program: a thread sleeps on the ring buffer and wakes the task that waits for the slot named.
//!
//! An event is a hint. What happened stands in the slot, so a spurious one is harmless; when the ring was full, every
//! waiting task is woken to look.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use aya::maps::{Array, MapData, RingBuf};
use aya_log::EbpfLogger;
use futures_util::task::AtomicWaker;
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::slots::{Slots, SpanRef};
use crate::{
    capability,
    panics::{self, Watch},
    probe::Point,
};

const THREAD: &str = "penstock-events";

/// How often retired slots are freed.
const RECLAIM: Duration = Duration::from_secs(1);

type ProgramLog = EbpfLogger<&'static dyn log::Log>;

pub struct Events {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    wakers: Box<[AtomicWaker]>,
    missed: AtomicU64,
    /// Whoever is told when the thread ends before it is asked to.
    watch: OnceLock<Watch>,
    failure: OnceLock<String>,
}

impl Events {
    /// Also hands on what the programs log and frees, now and then, slots that have been retired.
    pub(super) fn start(
        ring: RingBuf<MapData>,
        missed: Array<MapData, u64>,
        log: ProgramLog,
        slots: Arc<Slots>,
    ) -> io::Result<Self> {
        let wakers = (0..slots.len()).map(|_| AtomicWaker::new()).collect();
        let (missed_so_far, watch, failure) = (AtomicU64::new(0), OnceLock::new(), OnceLock::new());
        let shared = Arc::new(Shared { wakers, missed: missed_so_far, watch, failure });
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let (theirs, until) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(move || {
            // Reading what is mapped and open takes none. Where they cannot be given up, the start says so for all threads.
            let _ = capability::keep(&[]);
            let ended = catch_unwind(AssertUnwindSafe(|| run(ring, &missed, log, &theirs, &slots, &until)));
            theirs.fail(match ended {
                Ok(Ok(())) => return,
                Ok(Err(error)) => format!("waiting for events: {error}"),
                Err(panic) => panics::message(&*panic).to_owned(),
            });
        })?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// Has `watch` told when the thread ends before it is asked to.
    pub fn watch(&self, watch: Watch) {
        let _ = self.shared.watch.set(watch);
        self.shared.tell();
    }

    /// Ready when the span, of the slots at `index`, is released; otherwise the task is woken when the kernel says something
    /// of them.
    pub fn poll_released(&self, index: u32, span: SpanRef<'_>, cx: &mut Context<'_>) -> Poll<()> {
        // Register first: an event between the look and the registration would be lost the other way round.
        self.shared.wakers[index as usize].register(cx.waker());
        if span.is_released() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Events that found the ring full, since the last call.
    pub fn take_missed(&self) -> u64 {
        self.shared.missed.swap(0, Relaxed)
    }
}

impl Shared {
    fn fail(&self, why: String) {
        let _ = self.failure.set(why);
        self.tell();
    }

    fn tell(&self) {
        if let (Some(watch), Some(why)) = (self.watch.get(), self.failure.get()) {
            watch.fail(THREAD, why);
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    mut ring: RingBuf<MapData>,
    missed: &Array<MapData, u64>,
    mut log: ProgramLog,
    shared: &Shared,
    slots: &Slots,
    stop: &EventFd,
) -> nix::Result<()> {
    let mut reclaimed = Instant::now();
    let mut seen = 0;
    loop {
        while let Some(item) = ring.next() {
            let index = item.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(u64::MAX, u64::from_ne_bytes);
            if let Some(waker) = usize::try_from(index).ok().and_then(|index| shared.wakers.get(index)) {
                waker.wake();
            }
        }
        let total = missed.get(&0, 0).unwrap_or(seen);
        if total != seen {
            shared.missed.fetch_add(total.wrapping_sub(seen), Relaxed);
            seen = total;
            shared.wakers.iter().for_each(AtomicWaker::wake);
        }
        if reclaimed.elapsed() >= RECLAIM {
            slots.reclaim();
            reclaimed = Instant::now();
        }
        log.flush();
        if let Some(watch) = shared.watch.get() {
            watch.probe.at(Point::Events);
        }
        if wait(&ring, &log, stop.as_fd())?.is_break() {
            return Ok(());
        }
    }
}

/// Sleeps until one of the rings has something, or a second has passed and missed events are worth a look; breaks when it is
/// time to end.
fn wait(ring: &RingBuf<MapData>, log: &ProgramLog, stop: BorrowedFd<'_>) -> nix::Result<ControlFlow<()>> {
    let fds = [super::socket::borrow(ring), log.as_fd(), stop];
    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, 1000u16) {
        Err(nix::errno::Errno::EINTR) => Ok(ControlFlow::Continue(())),
        Ok(_) if fds[2].any() == Some(true) => Ok(ControlFlow::Break(())),
        Ok(_) => Ok(ControlFlow::Continue(())),
        Err(error) => Err(error),
    }
}
