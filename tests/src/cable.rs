//! A cable between two network namespaces whose faults a seed determines: it loses, repeats, delays and reorders packets of TCP, and
//! changes their numbers. Its ends are TAP interfaces, between which a thread of this process carries frames, so that it needs no
//! support of the kernel for such faults.
//!
//! After a reset has passed on a connection, nothing of this connection is lost: TCP does not repeat a reset, so that a peer that
//! only reads would wait forever without any fault of the agent.

mod frame;
mod numbers;

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    fmt,
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};
use parking_lot::Mutex;

use self::{frame::Segment, numbers::Numbers};
use crate::{Namespace, Random, tap};

pub use self::numbers::Renumbering;

/// Frames under way at once; more are lost, as in a full router.
const QUEUE: usize = 20_000;
/// Frames read from one end before the other one is looked at.
const BURST: usize = 64;
/// The longest frame: 64 KiB and headers.
const FRAME: usize = tap::HEADER + 14 + (1 << 16);

/// What happens to packets of TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// How many of a thousand packets are lost, arrive twice, and are overtaken.
    pub lost: u64,
    pub twice: u64,
    pub late: u64,
    /// The time on the way, up to so much more, and how much later a packet is that is overtaken.
    pub delay: Duration,
    pub jitter: Duration,
    pub lateness: Duration,
    pub numbers: Renumbering,
}

/// What a cable did.
#[derive(Clone, Debug, Default)]
pub struct Carried {
    pub packets: u64,
    pub lost: u64,
    pub twice: u64,
    pub late: u64,
    /// Segments whose sequence numbers wrap, and jumps of timestamp clocks.
    pub wraps: u64,
    pub jumps: u64,
    /// Window scales that SYNs announced.
    pub scales: BTreeSet<u8>,
}

impl Carried {
    pub fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.lost += other.lost;
        self.twice += other.twice;
        self.late += other.late;
        self.wraps += other.wraps;
        self.jumps += other.jumps;
        self.scales.extend(&other.scales);
    }
}

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packets, lost, twice, late, wraps, jumps, scales } = self;
        let scales: Vec<_> = scales.iter().map(ToString::to_string).collect();
        write!(
            f,
            "{packets} packets: {lost} lost, {twice} repeated, {late} overtaken; sequence numbers wrapped {wraps} times, \
             timestamp clocks jumped {jumps} times; window scales {}",
            scales.join(" ")
        )
    }
}

/// Carries frames until it is dropped.
pub struct Cable {
    stop: Arc<AtomicBool>,
    calm: Arc<AtomicBool>,
    carried: Arc<Mutex<Carried>>,
    thread: Option<JoinHandle<()>>,
}

impl Cable {
    /// Joins two namespaces by an interface in each. Both are down and without addresses.
    pub fn join(ends: [(&Namespace, &str); 2], offloads: bool, faults: Faults, random: Random) -> Result<Self> {
        let open = |(place, name): (&Namespace, &str)| -> Result<File> {
            place.run(|| tap::open(name, offloads))?.with_context(|| format!("making the interface {name}"))
        };
        let files = [open(ends[0])?, open(ends[1])?];
        let (stop, calm, carried) = (Arc::default(), Arc::default(), Arc::default());
        let carrier = Carrier {
            files,
            faults,
            random,
            numbers: Numbers::new(faults.numbers),
            queue: BinaryHeap::new(),
            count: 0,
            latest: [Instant::now(); 2],
            stop: Arc::clone(&stop),
            calm: Arc::clone(&calm),
            carried: Arc::clone(&carried),
        };
        let thread = std::thread::Builder::new().name("cable".to_owned()).spawn(move || carrier.run())?;
        Ok(Self { stop, calm, carried, thread: Some(thread) })
    }

    /// Loses and repeats nothing from now on; delays and numbers stay.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn carried(&self) -> Carried {
        self.carried.lock().clone()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A frame under way: when it arrives, its number, the end where it arrives, and its bytes.
type Due = Reverse<(Instant, u64, usize, Vec<u8>)>;

/// The thread of a cable.
struct Carrier {
    files: [File; 2],
    faults: Faults,
    random: Random,
    numbers: Numbers,
    queue: BinaryHeap<Due>,
    count: u64,
    /// When the last frame to each end arrives that is not overtaken.
    latest: [Instant; 2],
    stop: Arc<AtomicBool>,
    calm: Arc<AtomicBool>,
    carried: Arc<Mutex<Carried>>,
}

impl Carrier {
    fn run(mut self) {
        let mut buffer = vec![0; FRAME];
        while !self.stop.load(Ordering::Relaxed) {
            self.deliver();
            for from in 0..2 {
                for _ in 0..BURST {
                    match self.files[from].read(&mut buffer) {
                        Ok(len) => self.take(from, &mut buffer[..len]),
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            }
            self.wait();
        }
    }

    /// Waits for a frame, for the next one to be due, or for a while.
    fn wait(&self) {
        let most = Duration::from_millis(20);
        let next = self.queue.peek().map_or(most, |Reverse((due, ..))| due.saturating_duration_since(Instant::now()));
        let mut ends = self.files.each_ref().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
        let _ = ppoll(&mut ends, Some(TimeSpec::from_duration(next.min(most))), None);
    }

    /// Writes what is due.
    fn deliver(&mut self) {
        let now = Instant::now();
        while self.queue.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            let Some(Reverse((_, _, to, frame))) = self.queue.pop() else { return };
            // An interface that is down or full takes nothing.
            let _ = (&self.files[to]).write(&frame);
        }
    }

    /// Decides on a frame that was sent at one end.
    fn take(&mut self, from: usize, frame: &mut [u8]) {
        let to = 1 - from;
        let Some(mut segment) = Segment::find(frame) else { return self.send(to, frame, Duration::ZERO) };
        let is_reset = self.numbers.pass(&mut segment, &mut self.random);
        segment.finish();
        let is_calm = self.calm.load(Ordering::Relaxed);
        let Faults { lost, twice, late, lateness, .. } = self.faults;
        let mut happens = |per_mille: u64| self.random.below(1000) < per_mille && !is_calm;
        let (is_lost, is_repeated, is_late) = (happens(lost) && !is_reset, happens(twice), happens(late));
        {
            let mut carried = self.carried.lock();
            carried.packets += 1;
            carried.lost += u64::from(is_lost);
            carried.twice += u64::from(is_repeated);
            carried.late += u64::from(is_late);
            (carried.wraps, carried.jumps) = (self.numbers.wraps, self.numbers.jumps);
            if carried.scales.len() != self.numbers.scales.len() {
                carried.scales.clone_from(&self.numbers.scales);
            }
        }
        if is_lost {
            return;
        }
        let most = lateness.as_micros() as u64;
        let later = if is_late { Duration::from_micros(1 + self.random.below(most)) } else { Duration::ZERO };
        self.send(to, frame, later);
        if is_repeated {
            let later = Duration::from_micros(self.random.below(most));
            self.send(to, frame, later);
        }
    }

    /// Lets a frame arrive after the cable's delay and so much later. Frames that are not late keep their order.
    fn send(&mut self, to: usize, frame: &[u8], later: Duration) {
        let Faults { delay, jitter, .. } = self.faults;
        if self.queue.len() >= QUEUE {
            return;
        }
        let mut due = Instant::now() + delay + Duration::from_micros(self.random.below(jitter.as_micros() as u64));
        due = due.max(self.latest[to]);
        if later.is_zero() {
            self.latest[to] = due;
        }
        self.count += 1;
        self.queue.push(Reverse((due + later, self.count, to, frame.to_vec())));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const SIZE: usize = 3_000_000;

    /// Sends bytes through a cable, compares them, and returns what happened to the packets.
    fn stream(offloads: bool, faults: Faults) -> Carried {
        let places = [Namespace::new().unwrap(), Namespace::new().unwrap()];
        let cable = Cable::join([(&places[0], "x"), (&places[1], "x")], offloads, faults, Random::new(5)).unwrap();
        for (place, host) in places.iter().zip(1..) {
            place.ip(&format!("addr add 10.0.0.{host}/24 dev x")).unwrap();
            place.ip("link set x up").unwrap();
        }
        let listener = places[0].run(|| TcpListener::bind("10.0.0.1:0")).unwrap().unwrap();
        let to = listener.local_addr().unwrap();
        let mut sender = places[1].run(|| TcpStream::connect(to)).unwrap().unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
        let mut got = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sender.write_all(&bytes).unwrap();
                drop(sender);
            });
            receiver.read_to_end(&mut got).unwrap();
        });
        assert!(got == bytes, "{} bytes of {SIZE} arrived, or others", got.len());
        cable.carried()
    }

    #[test]
    fn stream_through_faults_is_whole() {
        let ms = Duration::from_millis;
        let numbers = Renumbering { sequences: true, clocks: true };
        let faults = Faults { lost: 20, twice: 20, late: 20, delay: ms(1), jitter: ms(1), lateness: ms(5), numbers };
        for offloads in [false, true] {
            let carried = stream(offloads, faults);
            let Carried { packets, lost, twice, late, wraps, jumps, .. } = carried;
            assert!(lost + twice + late > 0 && wraps > 0, "{carried}");
            // Unsegmented packets are few.
            assert_eq!(packets > SIZE as u64 / 1500, !offloads, "{carried}");
            assert!(offloads || [lost, twice, late, jumps].iter().all(|count| *count > 0), "{carried}");
        }
    }

    #[test]
    fn cable_without_faults_loses_nothing() {
        let carried = stream(true, Faults::default());
        assert_eq!((carried.lost, carried.twice, carried.late, carried.wraps, carried.jumps), (0, 0, 0, 0, 0));
    }
}
