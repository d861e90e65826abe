//! The records of flows, and a thread that wakes the tasks whose flows have changed, frees records that nobody uses, and lets flows
//! follow routes.
//!
//! An event is only a hint: the record holds the state. If the ring was full, every waiting task is woken.

use std::{
    collections::VecDeque,
    io,
    ops::ControlFlow,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Context,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use aya::maps::{Array, MapData, RingBuf};
use futures_util::task::AtomicWaker;
use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use parking_lot::Mutex;

use super::{LINGER, Registry, routes::Routes, table::Table};
use crate::{
    capability,
    kernel::{grace::Grace, socket},
    panics::LateWatch,
};

const THREAD: &str = "penstock-wire";
/// Time between two attempts to free records.
const RECLAIM: Duration = Duration::from_secs(1);

pub(super) struct Records {
    pub(super) table: Arc<Table>,
    free: Mutex<Vec<u32>>,
    /// Records that no key leads to any more, and that a running program may still use.
    retired: Mutex<Vec<u32>>,
    /// Records of flows that have ended, oldest first.
    lingering: Mutex<VecDeque<(Instant, u32)>>,
    most_lingering: usize,
    grace: Grace,
    wakers: Box<[AtomicWaker]>,
    missed: AtomicU64,
    /// Notified if the thread ends before it is asked to.
    pub(super) watch: LateWatch,
}

impl Records {
    pub(super) fn new(table: Arc<Table>) -> io::Result<Self> {
        let count = table.len();
        Ok(Self {
            table,
            free: Mutex::new((0..count).rev().collect()),
            retired: Mutex::default(),
            lingering: Mutex::default(),
            most_lingering: count as usize / 4,
            grace: Grace::new()?,
            wakers: (0..count).map(|_| AtomicWaker::new()).collect(),
            missed: AtomicU64::new(0),
            watch: LateWatch::new(THREAD),
        })
    }

    /// A free record; `None` if all are in use.
    pub(super) fn take(&self) -> Option<u32> {
        self.free.lock().pop()
    }

    /// Frees the record of a flow that the programs have forgotten, after a time in which they end.
    pub(super) fn retire(&self, index: u32) {
        self.retired.lock().push(index);
    }

    /// Keeps the record of a flow that has ended, for a time.
    pub(super) fn linger(&self, index: u32) {
        self.lingering.lock().push_back((Instant::now(), index));
    }

    /// Wakes the task of `cx` when the flow changes.
    pub(super) fn register(&self, index: u32, cx: &Context<'_>) {
        self.wakers[index as usize].register(cx.waker());
    }

    pub(super) fn wake_all(&self) {
        self.wakers.iter().for_each(AtomicWaker::wake);
    }

    /// Events that found no room, since the last call.
    pub(super) fn take_missed(&self) -> u64 {
        self.missed.swap(0, Relaxed)
    }

    /// Forgets what has lingered for long enough, then frees retired records. Takes some milliseconds if there are any.
    fn reclaim(&self) {
        while let Some(index) = self.over() {
            self.table.forget(index, self.table.ends(index));
            self.retire(index);
        }
        let retired = std::mem::take(&mut *self.retired.lock());
        if retired.is_empty() {
            return;
        }
        match self.grace.wait() {
            Ok(()) => {
                retired.iter().for_each(|&index| self.table.remove_ring(index));
                self.free.lock().extend(retired);
            }
            Err(error) => {
                tracing::warn!(%error, records = retired.len(), "could not wait for kernel programs, keeping records");
                self.retired.lock().extend(retired);
            }
        }
    }

    /// Takes a flow that has lingered for long enough, or the oldest of too many.
    fn over(&self) -> Option<u32> {
        let mut lingering = self.lingering.lock();
        let (since, _) = lingering.front()?;
        let is_over = since.elapsed() >= LINGER || lingering.len() > self.most_lingering;
        if is_over { lingering.pop_front().map(|(_, index)| index) } else { None }
    }
}

/// The thread.
pub(super) struct RecordEvents {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl RecordEvents {
    pub(super) fn start(
        ring: RingBuf<MapData>,
        missed: Array<MapData, u64>,
        records: Arc<Records>,
        registry: Arc<Registry>,
    ) -> io::Result<Self> {
        let routes = Routes::new()?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let until = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(THREAD.into()).spawn(move || {
            // Open descriptors need no capability.
            let _ = capability::keep(&[]);
            records.watch.run(|| run(ring, &missed, &records, routes, &registry, &until));
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for RecordEvents {
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
    records: &Records,
    mut routes: Routes,
    registry: &Registry,
    stop: &EventFd,
) -> Result<(), String> {
    let (mut seen, mut reclaimed) = (0, Instant::now());
    loop {
        while let Some(item) = ring.next() {
            let index = item.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(u64::MAX, u64::from_ne_bytes);
            if let Some(waker) = usize::try_from(index).ok().and_then(|index| records.wakers.get(index)) {
                waker.wake();
            }
        }
        let total = missed.get(&0, 0).unwrap_or(seen);
        if total != seen {
            records.missed.fetch_add(total.wrapping_sub(seen), Relaxed);
            seen = total;
            records.wake_all();
        }
        if reclaimed.elapsed() >= RECLAIM {
            records.reclaim();
            routes.follow(registry);
            reclaimed = Instant::now();
        }
        routes.read();
        if routes.is_pending() {
            routes.follow(registry);
        }
        records.watch.probe();
        if wait(&ring, &routes, stop).map_err(|error| format!("cannot wait for events: {error}"))?.is_break() {
            return Ok(());
        }
    }
}

/// Waits until the ring has data, routes have changed, or some time has passed. Breaks when the thread has to stop.
fn wait(ring: &RingBuf<MapData>, routes: &Routes, stop: &EventFd) -> nix::Result<ControlFlow<()>> {
    let mut fds = [socket::borrow(ring), stop.as_fd(), routes.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, if routes.is_pending() { 100u16 } else { 1000 }) {
        Err(nix::errno::Errno::EINTR) => Ok(ControlFlow::Continue(())),
        Ok(_) if fds[1].any() == Some(true) => Ok(ControlFlow::Break(())),
        Ok(_) => Ok(ControlFlow::Continue(())),
        Err(error) => Err(error),
    }
}
