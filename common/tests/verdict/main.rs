//! The slot protocol between verdict and agent, on a model of everything around it.
//!
//! One endpoint connection carries messages to one client. Endpoint, verdict, the kernel's worker, the client, the event thread and
//! the agent take steps in an order that a seed decides, also in the middle of a verdict. The agent's steps are those of `deliver`
//! and `steer` in `agent/src/`. Bytes are ranges of the endpoint's wire, so a lost, doubled or overtaking byte is a gap.
//!
//! Resets, idle timeouts and leaving clients are not modelled, because they end the delivery.
#![allow(unsafe_code)] // the slot is memory that two programs write

mod agent;
mod checks;
mod kernel;
mod messages;
#[path = "../support/random.rs"]
mod random;
mod segment;
#[path = "../support/walk.rs"]
mod walk;

use std::{cell::UnsafeCell, collections::VecDeque, mem::MaybeUninit, ops::Range, sync::atomic::Ordering::SeqCst};

use penstock_common::{
    framing::Framing,
    slot::{Slot, Word, stop},
    verdict::{SendBuffer, VerdictKernel, verdict},
};

use messages::{Message, some_messages};
use random::Random;
use segment::Segment;

const SCHEDULES: u64 = 25_000;
const KEY: u64 = 7;

/// The slot, which both sides access without a lock.
struct Shared(UnsafeCell<Slot>);

impl Shared {
    fn new() -> Self {
        // SAFETY: a slot consists of integers, so all zeros are a valid slot.
        Self(UnsafeCell::new(unsafe { MaybeUninit::zeroed().assume_init() }))
    }

    fn words(&self) -> &Slot {
        // SAFETY: the test runs on one thread, and uses only words and whole integers of this reference.
        unsafe { &*self.0.get() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Done {
    Complete,
    Broken,
}

/// The agent's position between two accesses to shared state.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Head,
    Forward,
    SettleToWrite,
    Write,
    Armable,
    Read,
    SettleToArm,
    Fill,
    Arm,
    ReadNow,
    Recheck,
    Register,
    Look,
    Asleep,
    Disarm { then_read: bool },
    Reclaim { then_read: bool },
    Finished(Done),
}

struct Agent {
    at: At,
    consumed: u64,
    pending: Range<usize>,
    /// The part of `pending` that is still to be written.
    writing: Range<usize>,
    framing: Framing,
    target: bool,
    hold: bool,
    before: u64,
    account: u64,
    unsettled: bool,
    registered: bool,
    woken: bool,
}

/// Counters of what happened over all schedules. The test is meaningful only if each case occurs.
#[derive(Default, Debug)]
struct Seen {
    redirects: u64,
    relayed: u64,
    slept: u64,
    stops: [u64; stop::COUNT],
    late: u64,
    armed_in_window: u64,
    disarmed: u64,
    fin_with_data: u64,
    shared_payload: u64,
    overlaps: u64,
    complete: u64,
    broken: u64,
}

struct World<'a> {
    slot: &'a Shared,
    random: Random,
    seen: &'a mut Seen,

    wire: Vec<u8>,
    messages: Vec<Message>,
    /// The message being delivered, and the end of what the endpoint has sent: it waits for the next request.
    message: usize,
    sent: usize,
    closes: bool,
    fin: bool,
    segment_cap: usize,
    /// How slow the endpoint is. A fast one rarely sends while the agent arms.
    pace: usize,
    max_steps: u32,

    /// A verdict runs: the endpoint's socket is locked.
    locked: bool,
    /// How many steps of others fit between two steps of this verdict; 1: none.
    haste: usize,
    receive: VecDeque<Range<usize>>,
    /// Passed without memory: the kernel's worker delivers it later.
    late: VecDeque<Range<usize>>,
    receive_limit: usize,

    backlog: VecDeque<Range<usize>>,
    written: usize,
    acked: usize,
    sequence: u32,
    send_limit: usize,
    stalled: bool,

    events: bool,
    /// A parser that has read every delivered or redirected byte of the message.
    reference: Framing,
    /// The slot is armed.
    armed: bool,
    agent: Agent,
}

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Endpoint,
    Worker,
    Late,
    Client,
    Events,
    Agent,
}

impl<'a> World<'a> {
    fn new(slot: &'a Shared, seen: &'a mut Seen, mut random: Random) -> Self {
        let (wire, messages) = some_messages(&mut random);
        // Counters that wrap where those of the kernel do.
        let redir = random.pick(&[0, u64::from(u32::MAX) - 50]);
        slot.words().span.redir.set(redir);
        let consumed = random.pick(&[0, 1 << 40]);
        slot.words().passed.set(consumed);
        // As if the stream had begun with the counters at 0.
        let begun = FIRST_SEQUENCE.wrapping_sub(consumed as u32).wrapping_sub(redir as u32);
        // SAFETY: one thread, and nothing else accesses the slot yet.
        unsafe { (*slot.0.get()).origin = 1 << 32 | u64::from(begun) };
        let framing = messages[0].framing;
        let sequence = random.pick(&[0, u32::MAX - 100, 1 << 31]);
        let agent = Agent {
            at: At::Head,
            consumed,
            pending: 0..0,
            writing: 0..0,
            framing,
            target: true,
            hold: false,
            before: 0,
            account: 0,
            unsettled: false,
            registered: false,
            woken: false,
        };
        let segment_cap = random.pick(&[8, 40, 120]);
        let pace = random.pick(&[1, 4, 20]);
        let max_steps = random.pick(&[4, 64, 4096, 4096]);
        let receive_limit = random.within(30, 300);
        let send_limit = random.within(30, 400);
        Self {
            slot,
            seen,
            wire,
            messages,
            message: 0,
            sent: 0,
            closes: random.one_in(2),
            fin: false,
            segment_cap,
            pace,
            max_steps,
            locked: false,
            haste: 1,
            receive: VecDeque::new(),
            late: VecDeque::new(),
            receive_limit,
            backlog: VecDeque::new(),
            written: 0,
            acked: 0,
            sequence,
            send_limit,
            stalled: false,
            events: false,
            reference: framing,
            armed: false,
            random,
            agent,
        }
    }

    fn run(&mut self) {
        loop {
            if self.random.one_in(16) {
                self.stalled = self.random.one_in(2);
            }
            let step = self.choose(true);
            let Some(step) = step else {
                if self.stalled {
                    self.stalled = false;
                    continue;
                }
                break;
            };
            self.take(step);
            if step == Step::Endpoint && self.random.one_in(4) {
                // The endpoint pauses: nothing wakes an agent that has missed an event.
                self.stalled = false;
                while let Some(step) = self.choose(false) {
                    self.take(step);
                }
                self.check_quiet();
            }
        }
        self.check_end();
    }

    fn choose(&mut self, endpoint: bool) -> Option<Step> {
        let endpoint = endpoint && !self.locked && self.endpoint_can_send();
        let can = [
            (Step::Endpoint, endpoint && self.random.one_in(self.pace)),
            (Step::Worker, !self.backlog.is_empty()),
            (Step::Late, !self.late.is_empty()),
            (Step::Client, !self.stalled && self.queued() > 0),
            (Step::Events, self.events),
            (Step::Agent, self.agent_can_run()),
        ];
        let mut enabled = [Step::Endpoint; 6];
        let mut count = 0;
        for (step, can) in can {
            if can {
                enabled[count] = step;
                count += 1;
            }
        }
        if count == 0 { endpoint.then_some(Step::Endpoint) } else { Some(self.random.pick(&enabled[..count])) }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Endpoint => self.endpoint(),
            Step::Worker => self.worker(),
            Step::Late => self.receive.extend(self.late.pop_front()),
            Step::Client => self.acked += self.random.within(1, self.queued()),
            Step::Events => {
                self.events = false;
                self.agent.woken |= std::mem::take(&mut self.agent.registered);
            }
            Step::Agent => self.agent(),
        }
        assert!(self.queued() + self.backlogged() <= self.send_limit, "the client's send buffer overflows");
    }

    /// Lets others take steps during a verdict.
    fn interleave(&mut self) {
        while !self.random.one_in(self.haste) {
            match self.choose(false) {
                Some(step) => self.take(step),
                None => break,
            }
        }
    }

    fn queued(&self) -> usize {
        self.written - self.acked
    }

    fn backlogged(&self) -> usize {
        bytes(&self.backlog)
    }

    fn readable(&self) -> bool {
        !self.locked && (!self.receive.is_empty() || (self.fin && self.late.is_empty()))
    }

    fn agent_can_run(&self) -> bool {
        match self.agent.at {
            At::Head | At::Read => self.readable(),
            At::SettleToWrite | At::SettleToArm => self.settled(),
            At::Write => self.queued() < self.send_limit,
            // A system call that takes the socket's lock.
            At::ReadNow => !self.locked,
            At::Asleep => self.agent.woken,
            At::Finished(_) => false,
            _ => true,
        }
    }

    fn settled(&self) -> bool {
        !self.agent.unsettled || self.written as u64 == self.agent.account
    }
}

fn bytes(queue: &VecDeque<Range<usize>>) -> usize {
    queue.iter().map(Range::len).sum()
}

/// The sequence number of the first byte. It wraps early in every stream.
const FIRST_SEQUENCE: u32 = 0xffff_ffc0;

/// Prints the seed of a failing schedule.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}: repeat it with PENSTOCK_SEED={}", self.0, self.0);
        }
    }
}

#[test]
fn every_byte_arrives_once_in_order_and_no_wake_up_is_lost() {
    let mut seen = Seen::default();
    let one = std::env::var("PENSTOCK_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in one.map_or(0..SCHEDULES, |seed| seed..seed + 1) {
        let _seed = Seed(seed);
        World::new(&Shared::new(), &mut seen, Random::new(seed)).run();
    }
    println!("{seen:?}");
    if one.is_none() {
        let reasons = [stop::REFUSED, stop::FRAMING, stop::ROOM, stop::TARGET, stop::FIN, stop::SHARED];
        assert!(reasons.iter().all(|&reason| seen.stops[reason as usize] > 0) && seen.stops[0] > 0, "{seen:?}");
        assert!(seen.shared_payload > 100, "{seen:?}");
        let counts = [seen.redirects, seen.relayed, seen.slept, seen.late, seen.armed_in_window, seen.disarmed];
        assert!(counts.iter().all(|&count| count > 100), "{seen:?}");
        assert!(
            seen.overlaps > 1000 && seen.fin_with_data > 1000 && seen.complete > 1000 && seen.broken > 1000,
            "{seen:?}"
        );
    }
}
