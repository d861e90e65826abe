//! The parts of both models: the slot, the program's view of the kernel, the client, and the weakened order.

use std::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{self, AcqRel, Acquire, Relaxed, Release, SeqCst},
        },
    },
};

use loom::sync::{Mutex, Notify};

use crate::{
    framing::Framing,
    slot::{Span, Word},
    verdict::{SendBuffer, VerdictKernel},
};

pub(crate) const KEY: u64 = 7;
/// Bytes of the message. Each is a segment, or a message that the endpoint sends.
pub(crate) const BYTES: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weakened {
    /// The agent's store that arms is relaxed.
    Arming,
    /// The program's second load of `armed` is relaxed.
    Armed,
    /// The program's store that disarms is relaxed.
    Clearing,
    /// The agent's load that sees the disarming is relaxed.
    Reclaiming,
    /// The program disarms before it has counted.
    ClearedFirst,
    /// The agent reads what has arrived before it arms, not after.
    ReadFirst,
    /// The agent arms as if it had consumed one byte more.
    ArmedAhead,
}

/// Counters of what happened over all orders. The check is meaningful only if each case occurs.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    redirected: AtomicU64,
    passed: AtomicU64,
    slept: AtomicU64,
    disarmed: AtomicU64,
    read_after_arming: AtomicU64,
}

impl Seen {
    pub(crate) fn all(&self) -> bool {
        let Self { redirected, passed, slept, disarmed, read_after_arming } = self;
        [redirected, passed, slept, disarmed, read_after_arming].iter().all(|count| count.load(Relaxed) > 0)
    }
}

/// The slot `S` without a lock: the model checks which side owns its fields.
pub(crate) struct Scene<S> {
    slot: UnsafeCell<S>,
    /// Stands for all fields that are not words. Every access to them accesses this too, so that loom reports races.
    plain: loom::cell::UnsafeCell<()>,
    /// Wakes the agent.
    pub(crate) event: Notify,
    /// Wakes the agent's `settle` when the client has received more of what was redirected.
    pub(crate) moved: Notify,
    /// What the client has received.
    pub(crate) client: Mutex<Vec<u8>>,
    /// What has reached the agent's socket. Verdicts and reads hold the lock.
    pub(crate) socket: Mutex<Vec<u8>>,
    /// Whether the client's send queue has room for each byte.
    room: [bool; BYTES],
    weakened: Option<Weakened>,
    seen: Arc<Seen>,
}

// SAFETY: the words are atomics. loom runs one thread at a time and reports unordered accesses to the rest.
unsafe impl<S> Sync for Scene<S> {}
// SAFETY: loom runs one thread at a time and reports unordered accesses.
unsafe impl<S> Send for Scene<S> {}

impl<S> Scene<S> {
    pub(crate) fn new(slot: S, room: [bool; BYTES], weakened: Option<Weakened>, seen: &Arc<Seen>) -> Self {
        Self {
            slot: UnsafeCell::new(slot),
            plain: loom::cell::UnsafeCell::new(()),
            event: Notify::new(),
            moved: Notify::new(),
            client: Mutex::new(Vec::new()),
            socket: Mutex::new(Vec::new()),
            room,
            weakened,
            seen: Arc::clone(seen),
        }
    }

    pub(crate) fn slot(&self) -> *mut S {
        self.slot.get()
    }

    /// Accesses fields that are not words.
    pub(crate) fn plain(&self) {
        self.plain.with_mut(|_| ());
    }

    pub(crate) fn is(&self, weakened: Weakened) -> bool {
        self.weakened == Some(weakened)
    }

    /// `order`, or `Relaxed` if this is the weakened one.
    pub(crate) fn order(&self, place: Weakened, order: Ordering) -> Ordering {
        if self.is(place) { Relaxed } else { order }
    }

    /// Takes what has arrived.
    pub(crate) fn read_now(&self) -> Vec<u8> {
        std::mem::take(&mut *self.socket.lock().unwrap())
    }

    /// Takes what has arrived, after arming.
    pub(crate) fn read_after_arming(&self) -> Vec<u8> {
        let bytes = self.read_now();
        self.seen.read_after_arming.fetch_add(u64::from(!bytes.is_empty()), Relaxed);
        bytes
    }

    /// Sleeps until there is an event.
    pub(crate) fn sleep(&self) {
        self.seen.slept.fetch_add(1, Relaxed);
        self.event.wait();
    }

    /// Forwards bytes in user space, from the position `framing`.
    pub(crate) fn forward(&self, framing: &mut Framing, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(framing.feed(&[*byte]), 1, "more bytes than the message has");
            self.client.lock().unwrap().push(*byte);
        }
    }

    /// The client has received every byte once and in order.
    pub(crate) fn check(&self) {
        let got = self.client.lock().unwrap();
        assert_eq!(*got, (0..BYTES as u8).collect::<Vec<_>>(), "every byte once, in order");
    }

    /// Arms the span, with the stores in the agent's order.
    pub(crate) fn arm(&self, span: *mut Span, framing: Framing, armed: u64) {
        self.plain();
        // SAFETY: the span is released, so these fields are the agent's; the model reports a race if not.
        unsafe {
            (*span).framing = framing;
            (*span).stop = 0;
            (*span).keep = 0;
            (*span).target.set(KEY);
            let armed = armed + u64::from(self.is(Weakened::ArmedAhead));
            (*span).armed.atomic().store(armed, self.order(Weakened::Arming, SeqCst));
        }
    }

    pub(crate) fn is_released(&self, span: *const Span) -> bool {
        // SAFETY: a word.
        unsafe { &(*span).armed }.atomic().load(self.order(Weakened::Reclaiming, Acquire)) == 0
    }

    pub(crate) fn disarm(&self, span: *const Span) {
        self.seen.disarmed.fetch_add(1, Relaxed);
        // SAFETY: a word.
        unsafe { &(*span).armed }.atomic().store(0, SeqCst);
    }

    pub(crate) fn redirected(&self, span: *const Span) -> u64 {
        // SAFETY: a word.
        unsafe { &(*span).redir }.atomic().load(Acquire)
    }

    /// The position in the message. Only while the span is released.
    pub(crate) fn framing(&self, span: *const Span) -> Framing {
        self.plain();
        // SAFETY: the span is released, so the field is the agent's; the model reports a race if not.
        unsafe { (*span).framing }
    }
}

/// A run of a program on one byte.
pub(crate) struct Program<'a, S> {
    pub(crate) scene: &'a Scene<S>,
    pub(crate) span: *const Span,
    pub(crate) byte: u8,
    /// The endpoint's `write_seq`.
    pub(crate) write_seq: u32,
    /// It uses fields of the span.
    owns: bool,
    redirected: bool,
}

impl<'a, S> Program<'a, S> {
    pub(crate) fn new(scene: &'a Scene<S>, span: *const Span, byte: u8, write_seq: u32) -> Self {
        Self { scene, span, byte, write_seq, owns: false, redirected: false }
    }

    pub(crate) fn own(&mut self) {
        self.owns = true;
        self.scene.plain();
    }

    /// Ends the run. Returns whether the kernel moves the byte.
    pub(crate) fn end(&self) -> bool {
        self.booked();
        let seen = if self.redirected { &self.scene.seen.redirected } else { &self.scene.seen.passed };
        seen.fetch_add(1, Relaxed);
        self.redirected
    }

    fn booked(&self) {
        if self.owns {
            self.scene.plain();
        }
    }
}

impl<S> VerdictKernel for Program<'_, S> {
    /// A read-modify-write, as in `agent-ebpf/src/memory.rs`.
    fn load_acquire(&mut self, word: &Word) -> u64 {
        word.atomic().fetch_add(0, self.scene.order(Weakened::Armed, AcqRel))
    }

    fn clear_release(&mut self, word: &Word) {
        // The program counted before this call.
        self.booked();
        self.owns = false;
        word.atomic().swap(0, self.scene.order(Weakened::Clearing, Release));
    }

    fn parse(&mut self, framing: &mut Framing, len: u32, _: bool) -> bool {
        self.own();
        framing.feed(&[self.byte][..len as usize]) == len as usize
    }

    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        assert_eq!(key, KEY, "a target that the agent did not set");
        let write_seq = self.scene.client.lock().unwrap().len() as u32;
        let queued = if self.scene.room[usize::from(self.byte)] { 0 } else { 1 << 20 };
        Some(SendBuffer { write_seq, queued, limit: 1 << 20, piece: 1 })
    }

    fn redirect(&mut self, _: u64) -> bool {
        self.redirected = true;
        true
    }

    fn now(&mut self) -> u64 {
        if self.scene.is(Weakened::ClearedFirst) {
            // SAFETY: a word.
            unsafe { &(*self.span).armed }.atomic().swap(0, AcqRel);
            self.scene.event.notify();
        }
        1
    }

    fn event(&mut self) {
        self.scene.event.notify();
    }
}

/// The span of a new connection.
pub(crate) fn span() -> Span {
    Span {
        armed: Word::default(),
        redir: Word::default(),
        target: Word::default(),
        framing: Framing::none(),
        first_ns: Word::default(),
        last_ns: Word::default(),
        segments: 0,
        stop: 0,
        keep: 0,
    }
}
