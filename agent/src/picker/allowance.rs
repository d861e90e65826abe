//! Bounds what an EPP sends, and how much it may change in the fields of a message.

use std::sync::Arc;

use http::HeaderMap;
use penstock_proto::ext_proc::HeaderMutation;

use super::message;
use crate::{budget::Budget, config::EppLimits};

/// Limits on what an EPP sends.
#[derive(Debug, Clone)]
pub struct ExchangeLimits {
    /// Most bytes of a replaced body or of an immediate reply's body.
    pub replaced_body: usize,
    /// The budget against which the bytes of a replaced body count.
    pub memory: Arc<Budget>,
    /// The configured limits on the EPP's messages.
    pub epp: EppLimits,
}

/// How large a mutation may still be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    fields: usize,
    bytes: usize,
}

impl Allowance {
    /// Pseudo-headers that are sent with a head.
    const PSEUDO: usize = 4;

    /// Enough to echo the head or the trailers, plus the configured limits.
    pub(super) fn of(head: &HeaderMap, limits: &EppLimits) -> Self {
        let bytes: usize = head.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        Self { fields: head.len() + Self::PSEUDO + limits.fields, bytes: bytes + limits.bytes }
    }

    /// For what echoes nothing.
    pub(super) fn plain(limits: &EppLimits) -> Self {
        Self { fields: limits.fields, bytes: limits.bytes }
    }

    /// Subtracts the mutation. Returns false if it does not fit.
    pub(super) fn take(&mut self, mutation: &HeaderMutation) -> bool {
        let set = mutation.set_headers.iter().filter_map(|set| set.header.as_ref());
        let set: usize = set.map(|header| header.key.len() + message::value(header).len()).sum();
        let removed: usize = mutation.remove_headers.iter().map(String::len).sum();
        let fields = mutation.set_headers.len() + mutation.remove_headers.len();
        let fits = fields <= self.fields && set + removed <= self.bytes;
        if fits {
            self.fields -= fields;
            self.bytes -= set + removed;
        }
        fits
    }
}
