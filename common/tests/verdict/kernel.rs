//! The endpoint's and the kernel's steps in the model: segments arrive, the verdict runs, and the kernel's worker hands on what was
//! redirected.

use super::*;

impl World<'_> {
    pub(super) fn endpoint_can_send(&self) -> bool {
        if self.sent == self.request_end() {
            return self.is_last() && self.must_close() && !self.fin;
        }
        bytes(&self.receive) + bytes(&self.late) < self.receive_limit
    }

    pub(super) fn is_last(&self) -> bool {
        self.message + 1 == self.messages.len()
    }

    pub(super) fn must_close(&self) -> bool {
        self.closes || !self.expected_end().1.is_done()
    }

    pub(super) fn request_end(&self) -> usize {
        self.messages.get(self.message + 1).map_or(self.wire.len(), |next| next.start)
    }

    /// The end of the current message, and the parser's state there.
    pub(super) fn expected_end(&self) -> (usize, Framing) {
        let Message { start, mut framing } = self.messages[self.message];
        let taken = framing.feed(&self.wire[start..]);
        (start + taken, framing)
    }

    pub(super) fn endpoint(&mut self) {
        let end = self.request_end();
        let len = if end == self.sent { 0 } else { self.random.within(1, self.segment_cap.min(end - self.sent)) };
        let segment = self.sent..self.sent + len;
        self.sent = segment.end;
        // The last segment may carry the FIN; then no empty one follows. The socket's state changes before the verdict runs.
        let fin = self.is_last() && self.sent == end && self.must_close() && (len == 0 || self.random.one_in(2));
        self.fin |= fin;
        self.seen.fin_with_data += u64::from(fin && len > 0);
        self.verdict(segment);
    }

    pub(super) fn verdict(&mut self, segment: Range<usize>) {
        self.locked = true;
        self.haste = self.random.pick(&[1, 2, 20]);
        // A retransmission may begin before the end of what has arrived; the program gets the whole segment.
        let overlap =
            if !segment.is_empty() && self.random.one_in(8) { self.random.within(0, segment.start.min(20)) } else { 0 };
        self.seen.overlaps += u64::from(overlap > 0);
        let len = (segment.len() + overlap) as u32;
        let slot = self.slot.0.get();
        let armed = &self.slot.words().span.armed;
        let shared = self.random.one_in(12);
        let mut kernel =
            Segment { world: self, segment: segment.clone(), overlap, shared, redirected: false, asked: false };
        if armed.get() == 0 {
            // The verdict has read 0 and has not counted yet. It does not see what is armed meanwhile.
            kernel.world.interleave();
            let meanwhile = armed.atomic().swap(0, SeqCst);
            kernel.world.seen.armed_in_window += u64::from(meanwhile != 0);
            // SAFETY: one thread, and here the verdict calls nothing that accesses the slot.
            verdict(unsafe { &mut *slot }, len, &mut kernel);
            armed.set(meanwhile);
        } else {
            // SAFETY: one thread. The model's steps inside the verdict access the slot as the agent does: by whole words, and other
            // fields only while the slot is released.
            verdict(unsafe { &mut *slot }, len, &mut kernel);
        }
        let (redirected, asked) = (kernel.redirected, kernel.asked);
        assert_eq!(kernel.overlap, 0, "bytes that had arrived were delivered again");
        if self.haste == 1 && asked && !redirected && self.slot_stop() == stop::ROOM {
            let full = self.queued() + self.backlogged() + segment.len();
            assert!(full > self.send_limit, "stopped for lack of room although there is room");
        }
        self.interleave();
        if redirected {
            self.backlog.push_back(segment);
        } else if len > 0 {
            // After late segments, or without memory: `sk_psock_verdict_apply` leaves it to the worker.
            if !self.late.is_empty() || self.random.one_in(8) {
                self.seen.late += 1;
                self.late.push_back(segment);
            } else {
                self.receive.push_back(segment);
            }
        }
        self.locked = false;
    }

    pub(super) fn slot_stop(&self) -> u32 {
        // SAFETY: one thread, and a whole integer.
        unsafe { (&raw const (*self.slot.0.get()).span.stop).read_volatile() }
    }

    pub(super) fn worker(&mut self) {
        let front = self.backlog[0].clone();
        let taken = self.random.within(1, front.len());
        assert!(self.queued() + taken <= self.send_limit, "the worker finds no room");
        self.client_gets(front.start..front.start + taken);
        self.backlog[0].start += taken;
        if self.backlog[0].is_empty() {
            self.backlog.pop_front();
        }
    }

    pub(super) fn client_gets(&mut self, range: Range<usize>) {
        assert_eq!(range.start, self.written, "out of order at the client");
        self.written = range.end;
    }
}
