//! Copies what a picker wants of a response body: every byte, or the end with its token counts.
//!
//! Takes the payload in order, whichever path carries it. Returns pieces for the picker's stream and, at the end of the
//! body, the rest. The client never waits for it: pieces wait in a bounded queue, and a picker that does not take them
//! gets no more of this response. A `Tee` exists only if a pool's picker wants one.

mod usage;

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use penstock_common::{framing::Framing, tail};

pub use usage::Usage;

use crate::config::ResponseToPicker;

/// Maximum size of a JSON document that is kept, in bytes; it has to be complete to be parsed.
const DOCUMENT: usize = 256 << 10;

#[derive(Debug)]
pub struct Tee {
    keep: Keep,
    /// The last bytes of the payload so far.
    kept: BytesMut,
    /// Whether bytes before `kept` were dropped.
    cut: bool,
    /// In mode `body`: pieces that the picker has not taken yet.
    queue: Option<Queue>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// The last events of an event stream.
    Events,
    /// A complete JSON document.
    Document,
    /// Nothing, because the body cannot be parsed.
    Nothing,
}

#[derive(Debug)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    limit: usize,
    given_up: bool,
}

impl Tee {
    /// Returns `None` if the picker only needs to know that the body ended. `length` is the declared length of the
    /// body, in bytes.
    pub fn new(mode: ResponseToPicker, headers: &HeaderMap, length: Option<u64>, queue_limit: usize) -> Option<Self> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = text(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let plain = matches!(text(header::CONTENT_ENCODING), "" | "identity");
        let too_long = length.is_some_and(|length| length > DOCUMENT as u64);
        let keep = match kind.as_str() {
            "text/event-stream" if plain => Keep::Events,
            "application/json" if plain && !too_long => Keep::Document,
            _ => Keep::Nothing,
        };
        let queue = match mode {
            ResponseToPicker::Headers => return None,
            ResponseToPicker::Usage if keep == Keep::Nothing => return None,
            ResponseToPicker::Usage => None,
            ResponseToPicker::Body => {
                Some(Queue { pieces: VecDeque::new(), bytes: 0, limit: queue_limit, given_up: false })
            }
        };
        Some(Self { keep, kept: BytesMut::new(), cut: false, queue })
    }

    /// Whether more is wanted than the tail that the kernel can keep.
    pub fn wants_all(&self) -> bool {
        self.queue.is_some() || self.keep == Keep::Document
    }

    /// Takes wire bytes of the body. `framing` is the state at their start; they must not exceed the message.
    pub fn take_framed(&mut self, mut framing: Framing, mut wire: &[u8]) {
        while !wire.is_empty() {
            let (taken, payload) = framing.next(wire);
            if let Some(payload) = payload {
                self.take(payload);
            }
            if taken == 0 {
                return;
            }
            wire = &wire[taken..];
        }
    }

    /// Takes the next payload bytes.
    pub fn take(&mut self, payload: &[u8]) {
        if let Some(queue) = &mut self.queue {
            queue.push(payload);
        }
        let limit = match self.keep {
            Keep::Events => tail::TAIL as usize,
            Keep::Document => DOCUMENT,
            Keep::Nothing => return,
        };
        let new = &payload[payload.len().saturating_sub(limit)..];
        let surplus = (self.kept.len() + new.len()).saturating_sub(limit);
        if surplus > 0 || new.len() < payload.len() {
            self.cut = true;
        }
        if self.keep == Keep::Document && self.cut {
            // A truncated JSON document cannot be parsed.
            self.kept = BytesMut::new();
            self.keep = Keep::Nothing;
            return;
        }
        let _ = self.kept.split_to(surplus.min(self.kept.len()));
        self.kept.extend_from_slice(new);
    }

    /// Notes a gap of unseen bytes: what was kept before it is dropped.
    pub fn skipped(&mut self) {
        self.kept.clear();
        self.cut = true;
    }

    /// Returns the next piece for the picker while the body is being delivered.
    pub fn next_piece(&mut self) -> Option<Bytes> {
        let queue = self.queue.as_mut()?;
        let piece = queue.pieces.pop_front()?;
        queue.bytes -= piece.len();
        Some(piece)
    }

    /// Whether the picker did not take its pieces in time.
    pub fn given_up(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.given_up)
    }

    /// Returns what the picker still gets at the end of the body.
    pub fn rest(&mut self) -> Vec<Bytes> {
        if let Some(queue) = &mut self.queue {
            return std::mem::take(&mut queue.pieces).into();
        }
        let end = self.end();
        if end.is_empty() { Vec::new() } else { vec![Bytes::copy_from_slice(end)] }
    }

    /// The tokens that the body reports, if it does.
    pub fn usage(&self) -> Option<Usage> {
        match self.keep {
            Keep::Events => usage::of_events(self.end()),
            Keep::Document => usage::of_document(&self.kept),
            Keep::Nothing => None,
        }
    }

    /// The kept bytes, from the first complete event on.
    fn end(&self) -> &[u8] {
        match self.keep {
            Keep::Events if self.cut => after_blank_line(&self.kept),
            _ => &self.kept,
        }
    }
}

impl Queue {
    fn push(&mut self, payload: &[u8]) {
        if self.given_up {
            return;
        }
        self.bytes += payload.len();
        if self.bytes > self.limit {
            // A body with a gap would be a different body.
            self.given_up = true;
            self.pieces = VecDeque::new();
            self.bytes = 0;
            return;
        }
        self.pieces.push_back(Bytes::copy_from_slice(payload));
    }
}

/// What follows the first blank line, which ends an event (three spellings: WHATWG HTML, §9.2.6).
fn after_blank_line(text: &[u8]) -> &[u8] {
    for at in 0..text.len() {
        for end in [b"\n\n".as_slice(), b"\r\n\r\n", b"\r\r"] {
            if text[at..].starts_with(end) {
                return &text[at + end.len()..];
            }
        }
    }
    &[]
}

#[cfg(test)]
mod tests;
