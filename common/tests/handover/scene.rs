//! What both rules have around them: the memory that is handed over, the program's view of the kernel, the client, and which
//! order is weakened.

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
    verdict::{Kernel, SendBuffer},
};

pub(crate) const KEY: u64 = 7;
/// Bytes of the message, each a segment or a message of the endpoint's own.
pub(crate) const BYTES: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weakened {
    /// The agent's store that arms is relaxed.
    Arming,
    /// The program's second load is.
    Armed,
    /// The program's store that lets go is.
    Clearing,
    /// The agent's load that sees it is.
    TakingBack,
    /// The program lets go before it has written its books.
    ClearedFirst,
    /// The agent reads what has arrived before it arms, and not behind that.
    ReadFirst,
    /// The agent arms as if it had read one byte more.
    ArmedAhead,
}

/// What has happened, over all orders: a check is worth something only if everything does.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    redirected: AtomicU64,
    passed: AtomicU64,
    slept: AtomicU64,
    disarmed: AtomicU64,
    read_behind_arming: AtomicU64,
}

impl Seen {
    pub(crate) fn all(&self) -> bool {
        let Self { redirected, passed, slept, disarmed, read_behind_arming } = self;
        [redirected, passed, slept, disarmed, read_behind_arming].iter().all(|count| count.load(Relaxed) > 0)
    }
}

/// The slot `S`, without a lock; which of its fields are whose is what is checked.
pub(crate) struct Scene<S> {
    slot: UnsafeCell<S>,
    /// Stands for all fields that are not words: who touches them touches this, and loom tells when two do so at once.
    plain: loom::cell::UnsafeCell<()>,
    /// The agent's sleep.
    pub(crate) event: Notify,
    /// The client has got more of what was redirected: the next look of `settle`.
    pub(crate) moved: Notify,
    /// What the client has got.
    pub(crate) client: Mutex<Vec<u8>>,
    /// What has reached the agent's socket; locked for as long as a verdict runs, and by whoever reads it.
    pub(crate) socket: Mutex<Vec<u8>>,
    /// Whether the client's send queue has room for each byte.
    room: [bool; BYTES],
    weakened: Option<Weakened>,
    seen: Arc<Seen>,
}

// SAFETY: the words are atomics; of the rest loom runs one thread at a time, and tells of accesses that nothing orders.
unsafe impl<S> Sync for Scene<S> {}
// SAFETY: as above.
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

    /// `order`, unless it is the one to be weakened.
    pub(crate) fn order(&self, place: Weakened, order: Ordering) -> Ordering {
        if self.is(place) { Relaxed } else { order }
    }

    /// Takes what has arrived.
    pub(crate) fn read_now(&self) -> Vec<u8> {
        std::mem::take(&mut *self.socket.lock().unwrap())
    }

    /// Takes what has arrived, once the flow is handed over.
    pub(crate) fn read_behind_arming(&self) -> Vec<u8> {
        let bytes = self.read_now();
        self.seen.read_behind_arming.fetch_add(u64::from(!bytes.is_empty()), Relaxed);
        bytes
    }

    /// Sleeps until there is an event.
    pub(crate) fn sleep(&self) {
        self.seen.slept.fetch_add(1, Relaxed);
        self.event.wait();
    }

    /// Writes as user space, which stands at `framing`.
    pub(crate) fn forward(&self, framing: &mut Framing, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(framing.feed(&[*byte]), 1, "the message has more bytes than it has");
            self.client.lock().unwrap().push(*byte);
        }
    }

    /// Every byte once, in order.
    pub(crate) fn check(&self) {
        let got = self.client.lock().unwrap();
        assert_eq!(*got, (0..BYTES as u8).collect::<Vec<_>>(), "every byte once, in order");
    }

    /// The agent's half of `Span`, in the order of `SpanRef`.
    pub(crate) fn arm(&self, span: *mut Span, framing: Framing, armed: u64) {
        self.plain();
        // SAFETY: released, so these fields are the agent's; the model tells if not.
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
        unsafe { &(*span).armed }.atomic().load(self.order(Weakened::TakingBack, Acquire)) == 0
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

    /// Where the message stands. Only while released.
    pub(crate) fn framing(&self, span: *const Span) -> Framing {
        self.plain();
        // SAFETY: as in `arm`.
        unsafe { (*span).framing }
    }
}

/// A program at work on one byte.
pub(crate) struct Program<'a, S> {
    pub(crate) scene: &'a Scene<S>,
    pub(crate) span: *const Span,
    pub(crate) byte: u8,
    /// The endpoint's `write_seq`.
    pub(crate) write_seq: u32,
    /// It has begun to use what was handed over.
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

    /// The program is over, and has written its books if it has not let go of them. True: the byte is the kernel's to move.
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

impl<S> Kernel for Program<'_, S> {
    /// A read-modify-write, as there (`agent-ebpf/src/memory.rs`).
    fn load_acquire(&mut self, word: &Word) -> u64 {
        word.atomic().fetch_add(0, self.scene.order(Weakened::Armed, AcqRel))
    }

    fn clear_release(&mut self, word: &Word) {
        // The books have been written just now.
        self.booked();
        self.owns = false;
        word.atomic().swap(0, self.scene.order(Weakened::Clearing, Release));
    }

    fn parse(&mut self, framing: &mut Framing, len: u32, _: bool) -> bool {
        self.own();
        framing.feed(&[self.byte][..len as usize]) == len as usize
    }

    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        assert_eq!(key, KEY, "a target that the agent has not named");
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

/// A span as it is when a connection is made.
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
