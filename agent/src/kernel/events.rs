//! Events of the kernel programs: a thread waits on the ring buffer and wakes the task that waits for the slot named.
//!
//! An event is only a hint: the slot holds the state, so a spurious event is harmless. If the ring was full, every
//! waiting task is woken to check its slot.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
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
    panics::{LateWatch, PanicWatch},
};

const THREAD: &str = "penstock-events";

/// Time between two attempts to free retired slots.
const RECLAIM: Duration = Duration::from_secs(1);

type ProgramLog = EbpfLogger<&'static dyn log::Log>;

pub struct Events {
    shared: Arc<SharedEvents>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

struct SharedEvents {
    wakers: Box<[AtomicWaker]>,
    missed: AtomicU64,
    /// Notified if the thread ends before it is asked to.
    watch: LateWatch,
}

impl Events {
    /// Starts the thread, which also forwards the programs' log lines and frees retired slots.
    pub(super) fn start(
        ring: RingBuf<MapData>,
        missed: Array<MapData, u64>,
        log: ProgramLog,
        slots: Arc<Slots>,
    ) -> io::Result<Self> {
        let wakers = (0..slots.len()).map(|_| AtomicWaker::new()).collect();
        let shared = Arc::new(SharedEvents { wakers, missed: AtomicU64::new(0), watch: LateWatch::new(THREAD) });
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let (theirs, until) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(move || {
            // Reading mapped memory and open descriptors needs no capability. A failure to drop them is reported at the
            // start.
            let _ = capability::keep(&[]);
            theirs.watch.run(|| run(ring, &missed, log, &theirs, &slots, &until));
        })?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// Notifies `watch` if the thread ends before it is asked to.
    pub fn watch(&self, watch: PanicWatch) {
        self.shared.watch.set(watch);
    }

    /// Ready when the span of the slot at `index` is released. Otherwise wakes the task at the next event for the slot.
    pub fn poll_released(&self, index: u32, span: SpanRef<'_>, cx: &mut Context<'_>) -> Poll<()> {
        // Register before the check; otherwise an event between the two would be lost.
        self.shared.wakers[index as usize].register(cx.waker());
        if span.is_released() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Number of events lost because the ring was full, since the last call.
    pub fn take_missed(&self) -> u64 {
        self.shared.missed.swap(0, Relaxed)
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
    shared: &SharedEvents,
    slots: &Slots,
    stop: &EventFd,
) -> Result<(), String> {
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
        shared.watch.probe();
        if wait(&ring, &log, stop.as_fd()).map_err(|error| format!("cannot wait for events: {error}"))?.is_break() {
            return Ok(());
        }
    }
}

/// Waits until a ring has data or one second has passed, so that missed events are noticed. Breaks when the thread has
/// to stop.
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
