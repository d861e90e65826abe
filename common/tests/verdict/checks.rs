//! What has to hold when nothing moves and when a schedule is over.

use super::*;

impl World<'_> {
    /// Everything but the endpoint is idle and the client reads, so the agent must be waiting for the endpoint.
    pub(super) fn check_quiet(&self) {
        let at = self.agent.at;
        if matches!(at, At::Finished(_)) {
            return;
        }
        assert!(matches!(at, At::Asleep | At::Read | At::Head), "stuck at {at:?}");
        assert!(self.receive.is_empty() && self.late.is_empty(), "asleep at {at:?} although bytes are readable");
        assert!(self.agent.pending.is_empty() && self.backlog.is_empty() && self.queued() == 0, "{at:?}");
        assert!(!self.fin, "asleep at {at:?} although the endpoint has closed");
        assert_eq!(self.slot.words().passed.get(), self.agent.consumed);
        assert_eq!(self.written, self.sent, "asleep at {at:?} although bytes are missing");
        assert!(at != At::Asleep || !self.slot.words().span.is_released(), "asleep although the slot is released");
        assert!(!self.reference.is_done() || at == At::Head, "asleep after the end");
    }

    pub(super) fn check_end(&mut self) {
        let At::Finished(done) = self.agent.at else { panic!("asleep for ever at {:?}", self.agent.at) };
        let (end, framing) = self.expected_end();
        let expected = if framing.may_close() { Done::Complete } else { Done::Broken };
        assert!(self.is_last() || !self.agent.pending.is_empty(), "ended before the last message");
        assert_eq!(done, expected);
        assert_eq!((self.written, self.acked, self.agent.account), (end, end, end as u64), "at the client");
        assert_eq!(framing, self.reference);
        match done {
            Done::Complete => self.seen.complete += 1,
            _ => self.seen.broken += 1,
        }
    }
}
