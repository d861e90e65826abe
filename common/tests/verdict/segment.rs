//! What the verdict sees of the model's kernel.

use super::*;

/// The verdict on one segment. At each call others may take steps.
pub(super) struct Segment<'w, 'a> {
    pub(super) world: &'w mut World<'a>,
    pub(super) segment: Range<usize>,
    /// Leading bytes that had arrived before.
    pub(super) overlap: usize,
    /// The sender can still write the segment's memory.
    pub(super) shared: bool,
    pub(super) redirected: bool,
    /// The target was looked up.
    pub(super) asked: bool,
}

impl VerdictKernel for Segment<'_, '_> {
    fn load_acquire(&mut self, word: &Word) -> u64 {
        self.world.interleave();
        let value = word.atomic().load(SeqCst);
        self.world.interleave();
        value
    }

    fn clear_release(&mut self, word: &Word) {
        self.world.interleave();
        self.world.armed = false;
        word.atomic().store(0, SeqCst);
        self.world.interleave();
    }

    fn parse(&mut self, framing: &mut Framing, _: u32, _: bool) -> bool {
        walk::parse(framing, &self.world.wire[self.segment.clone()], self.world.max_steps)
    }

    fn target(&mut self, key: u64) -> Option<SendBuffer> {
        assert_eq!(key, KEY);
        if self.world.random.one_in(50) {
            return None;
        }
        self.asked = true;
        // In the program's order: bytes that move in between count twice rather than not at all.
        let write_seq = self.world.sequence.wrapping_add(self.world.written as u32);
        self.world.interleave();
        let queued = self.world.queued() as i32;
        // In this model bytes cost no extra memory, but the rule keeps 16 KiB free.
        Some(SendBuffer { write_seq, queued, limit: self.world.send_limit as i32 + (16 << 10), piece: u32::MAX })
    }

    fn redirect(&mut self, _: u64) -> bool {
        self.world.interleave();
        if self.world.random.one_in(50) {
            return false;
        }
        let world = &mut *self.world;
        assert!(world.armed, "a redirect after a stop");
        assert!(world.receive.is_empty() && world.late.is_empty(), "a redirect overtakes passed bytes");
        assert!(world.agent.pending.is_empty() && world.agent.writing.is_empty(), "a redirect overtakes the agent");
        assert_eq!(self.segment.start, world.written + world.backlogged());
        let full = world.queued() + world.backlogged() + self.segment.len();
        assert!(full <= world.send_limit, "a redirect without room");
        let mut reference = world.reference;
        assert_eq!(reference.feed(&world.wire[self.segment.clone()]), self.segment.len(), "a redirect after the end");
        assert!(!reference.is_invalid(), "a redirect of an invalid message");
        let mut before = world.reference;
        let payload = before.skip(self.segment.len() as u64) as usize;
        assert!(
            !self.shared || payload == self.segment.len(),
            "a redirect of syntax in memory that the sender can still write"
        );
        world.seen.shared_payload += u64::from(self.shared);
        world.reference = reference;
        world.seen.redirects += 1;
        self.redirected = true;
        true
    }

    fn now(&mut self) -> u64 {
        self.world.interleave();
        1
    }

    fn event(&mut self) {
        self.world.interleave();
        self.world.events = true;
    }
}

impl penstock_common::verdict::Segment for Segment<'_, '_> {
    fn sequence(&mut self) -> u32 {
        FIRST_SEQUENCE.wrapping_add((self.segment.start - self.overlap) as u32)
    }

    fn trim(&mut self, bytes: u32) -> bool {
        assert_eq!(bytes as usize, self.overlap);
        self.overlap = 0;
        true
    }

    fn closed(&mut self) -> bool {
        self.world.fin
    }

    fn is_shared(&mut self) -> bool {
        self.shared
    }
}
