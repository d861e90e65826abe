//! What is held of a response while the EPP may still change it: its head, and a body with a length.

use bytes::Bytes;
use ring::digest;

use crate::http::response::{BodyKind, ResponseHead};

/// Whether the EPP may still change the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeldHead {
    /// The head is held until the EPP says something about the response.
    Awaited,
    /// The EPP has answered for the body first. A reply to the head is applied if a body is held.
    Unanswered,
    /// The EPP has replied to it, or it has gone out.
    Settled,
}

/// What tells whether the EPP left the body as it was.
pub(super) struct HeldBody {
    original: digest::Context,
    returned: digest::Context,
    pub(super) limit: usize,
}

impl HeldBody {
    /// A body with a length within the limit is held, except for an event stream.
    pub(super) fn of(head: &ResponseHead, limit: usize) -> Option<Self> {
        let BodyKind::Length(length) = head.body else { return None };
        let fits = !head.is_event_stream() && length <= limit as u64;
        let digest = || digest::Context::new(&digest::SHA256);
        fits.then(|| Self { original: digest(), returned: digest(), limit })
    }

    /// A piece of the endpoint's body.
    pub(super) fn original(&mut self, piece: &Bytes) {
        self.original.update(piece);
    }

    /// A piece of what the client gets.
    pub(super) fn returned(&mut self, piece: &Bytes) {
        self.returned.update(piece);
    }

    /// Whether the client gets another body than the endpoint's.
    pub(super) fn differs(self) -> bool {
        self.original.finish().as_ref() != self.returned.finish().as_ref()
    }
}
