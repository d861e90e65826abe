//! Counts the requests that h2 refuses, because they are malformed or too many at once: the agent does not see them.

use crate::http::frame_heads::{FrameHead, kind};

#[derive(Debug, Default)]
pub(super) struct RefusedRequests {
    /// The last stream that the client began.
    last: u32,
    begun: u64,
    accepted: u64,
    counted: u64,
}

impl RefusedRequests {
    /// Notes a received frame.
    pub(super) fn received(&mut self, frame: FrameHead) {
        if frame.kind == kind::HEADERS && frame.stream > self.last {
            self.last = frame.stream;
            self.begun += 1;
        }
    }

    /// h2 has accepted a request.
    pub(super) fn accepted(&mut self) {
        self.accepted += 1;
    }

    /// h2 has decided on everything that was read; the last head is incomplete if it `is_unfinished`. Returns how many more requests
    /// it has refused.
    pub(super) fn more(&mut self, is_unfinished: bool) -> u64 {
        let refused = self.begun.saturating_sub(self.accepted + u64::from(is_unfinished));
        let more = refused.saturating_sub(self.counted);
        self.counted += more;
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_are_not_accepted_are_counted_once() {
        let mut refused = RefusedRequests::default();
        let begin = |refused: &mut RefusedRequests, stream, kind| {
            refused.received(FrameHead { length: 10, kind, flags: 4, stream });
        };
        begin(&mut refused, 1, kind::HEADERS);
        assert_eq!(refused.more(true), 0);
        refused.accepted();
        assert_eq!(refused.more(false), 0);
        // Trailers, and a body.
        begin(&mut refused, 1, kind::HEADERS);
        begin(&mut refused, 1, kind::DATA);
        assert_eq!(refused.more(false), 0);
        for stream in [3, 5, 7] {
            begin(&mut refused, stream, kind::HEADERS);
        }
        refused.accepted();
        assert_eq!(refused.more(true), 1);
        assert_eq!(refused.more(false), 1);
        assert_eq!(refused.more(false), 0);
    }
}
