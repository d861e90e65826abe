//! The agent's steps in the model.

use super::*;

impl World<'_> {
    /// Reads as user space does. Returns 0 at the end of the stream.
    fn receive(&mut self) -> Option<usize> {
        let Some(front) = self.receive.front_mut() else {
            return (self.fin && self.late.is_empty()).then_some(0);
        };
        let taken = self.random.within(1, front.len());
        let range = front.start..front.start + taken;
        front.start += taken;
        if front.start == front.end {
            self.receive.pop_front();
        }
        let pending = &mut self.agent.pending;
        assert!(pending.start == pending.end || pending.end == range.start, "out of order at the agent");
        *pending = if pending.start == pending.end { range } else { pending.start..range.end };
        self.agent.consumed += taken as u64;
        Some(taken)
    }

    pub(super) fn agent(&mut self) {
        let slot = self.slot.words();
        self.agent.at = match self.agent.at {
            At::Head => match self.receive() {
                Some(0) => At::Finished(Done::Broken),
                _ => {
                    slot.span.first_ns.set(0);
                    slot.span.last_ns.set(0);
                    At::Forward
                }
            },
            At::Forward => self.forward(),
            At::SettleToWrite => {
                self.agent.unsettled = false;
                At::Write
            }
            At::Write => self.write(),
            At::Armable => self.armable(),
            At::Read => match self.receive() {
                Some(0) if self.agent.framing.may_close() => At::Finished(Done::Complete),
                Some(0) => At::Finished(Done::Broken),
                _ => At::Forward,
            },
            At::SettleToArm => {
                self.agent.unsettled = false;
                At::Fill
            }
            At::Fill => self.fill(),
            At::Arm => {
                self.armed = true;
                slot.span.armed.atomic().store(self.agent.consumed + 1, SeqCst);
                At::ReadNow
            }
            At::ReadNow => match self.receive() {
                None => At::Recheck,
                Some(n) => At::Disarm { then_read: n == 0 },
            },
            // Passed, but not readable yet: the verdict would refuse the arming, but may never run.
            At::Recheck if slot.passed.get() != self.agent.consumed => At::Disarm { then_read: false },
            At::Recheck => At::Register,
            At::Register => {
                // An earlier wake-up does not count for the sleep that follows.
                self.agent.woken = false;
                self.agent.registered = true;
                At::Look
            }
            At::Look if slot.span.is_released() => At::Reclaim { then_read: false },
            At::Look => {
                self.seen.slept += 1;
                At::Asleep
            }
            At::Asleep => At::Register,
            At::Disarm { then_read } => {
                self.disarm();
                At::Reclaim { then_read }
            }
            At::Reclaim { then_read } => {
                self.reclaim();
                if then_read { At::Read } else { At::Forward }
            }
            At::Finished(done) => At::Finished(done),
        };
    }

    /// Takes the next bytes to write from those that were received.
    fn forward(&mut self) -> At {
        let pending = self.agent.pending.clone();
        if !pending.is_empty() && !self.agent.framing.is_done() && !self.agent.framing.is_invalid() {
            let taken = self.agent.framing.feed(&self.wire[pending.clone()]);
            self.reference.feed(&self.wire[pending.start..pending.start + taken]);
            self.agent.writing = pending.start..pending.start + taken;
            self.agent.pending.start += taken;
            At::SettleToWrite
        } else if self.agent.framing.is_invalid() {
            At::Finished(Done::Broken)
        } else if self.agent.framing.is_done() {
            self.next_message()
        } else {
            At::Armable
        }
    }

    fn armable(&mut self) -> At {
        let caught_up = !self.agent.hold || self.queued() <= self.send_limit / 4;
        if self.agent.target && self.slot.words().passed.get() == self.agent.consumed && caught_up {
            self.agent.hold = false;
            At::SettleToArm
        } else {
            At::Read
        }
    }

    fn disarm(&mut self) {
        let span = &self.slot.words().span;
        if !span.is_released() {
            self.seen.disarmed += 1;
            span.armed.atomic().store(0, SeqCst);
            self.armed = false;
        }
    }

    /// Writes to the client's socket.
    fn write(&mut self) -> At {
        let range = self.agent.writing.clone();
        let taken = range.len().min(self.random.within(1, self.send_limit - self.queued()));
        self.client_gets(range.start..range.start + taken);
        self.agent.writing.start += taken;
        self.agent.account += taken as u64;
        self.seen.relayed += taken as u64;
        if self.agent.writing.is_empty() { At::Forward } else { At::Write }
    }

    /// Fills the slot before it is armed.
    fn fill(&mut self) -> At {
        let (slot, raw) = (self.slot.words(), self.slot.0.get());
        self.agent.before = slot.span.redir.get();
        // SAFETY: released, so these fields are the agent's.
        unsafe {
            (&raw mut (*raw).span.framing).write_volatile(self.agent.framing);
            (&raw mut (*raw).wbase).write_volatile(0);
            (&raw mut (*raw).span.stop).write_volatile(0);
        }
        slot.span.target.set(KEY);
        At::Arm
    }

    /// Takes back what the kernel has done.
    fn reclaim(&mut self) {
        let (slot, raw) = (self.slot.words(), self.slot.0.get());
        // SAFETY: released, so the kernel does not write it.
        let framing = unsafe { (&raw const (*raw).span.framing).read_volatile() };
        let stop = self.slot_stop();
        let steered = slot.span.redir.get() - self.agent.before;
        assert_eq!(framing, self.reference, "the slot's framing");
        self.agent.framing = framing;
        self.agent.account += steered;
        self.agent.unsettled |= steered > 0;
        self.seen.stops[stop as usize] += 1;
        if stop != 0 {
            self.agent.hold = stop == stop::ROOM;
        }
        if stop == stop::TARGET || stop == stop::SHARED {
            self.agent.target = false;
        }
    }

    /// Starts the next message after a complete one, if the connection can carry it.
    fn next_message(&mut self) -> At {
        if !self.agent.pending.is_empty() || self.is_last() {
            return At::Finished(Done::Complete);
        }
        self.message += 1;
        self.agent.framing = self.messages[self.message].framing;
        self.reference = self.agent.framing;
        self.agent.target = !self.random.one_in(8);
        self.agent.hold = false;
        At::Head
    }
}
