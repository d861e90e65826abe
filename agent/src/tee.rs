//! Copies what a picker wants of a response body: its beginning, and its end with the token counts or every byte.
//!
//! Takes the payload in order, whichever path carries it. Returns pieces for the picker's stream and, at the end of the body, the
//! rest. The client waits only for a picker that answers for the body. A `Tee` exists only if a pool's picker wants one.

mod begin;
mod cut;
mod events;
mod queue;
mod tail;
mod usage;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use penstock_common::framing::Framing;

pub(crate) use events::data;
pub use usage::Usage;

use self::{begin::Begin, queue::PieceQueue, tail::Tail, usage::FoundUsage};
use crate::{
    budget::{Budget, Share},
    config::ResponseToPicker,
    http::media::{EVENTS, JSON, is_coded, is_events, media_type},
};

/// Maximum size of a JSON document that is kept, in bytes; it has to be complete to be parsed.
const DOCUMENT: usize = 256 << 10;

/// The part of a response's body that the EPP needs, kept while the body passes.
#[derive(Debug)]
pub struct Tee {
    body: KeptBody,
    /// What the first event of a stream reports.
    first: FoundUsage,
    /// In mode `body`: pieces that the picker has not taken yet.
    queue: Option<PieceQueue>,
}

/// The facts about a response that say how its body is read.
#[derive(Debug, Clone, Copy)]
pub struct BodyFacts<'a> {
    /// The fields of the response's head.
    pub headers: &'a HeaderMap,
    /// The declared length of the body, in bytes.
    pub length: Option<u64>,
    /// The request asked for a stream.
    pub streams: bool,
}

/// What is kept of a body.
#[derive(Debug)]
enum KeptBody {
    /// The first event of an event stream, and the last ones unless only the beginning is wanted.
    Events(Begin, Option<Tail>),
    /// That a stream has begun which cannot be read.
    Coded(Begin),
    /// A complete JSON document, and its share of the memory budget.
    Document(BytesMut, Share),
    /// There was no memory for the document.
    Refused,
    Nothing,
}

/// What the picker still gets at the end of a body.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rest {
    pub pieces: Vec<Bytes>,
}

impl Tee {
    /// Returns `None` if the picker only needs to know that the body ended. A document counts against `memory`.
    pub fn new(mode: ResponseToPicker, facts: &BodyFacts<'_>, memory: &Arc<Budget>) -> Option<Self> {
        let body = match (KeptBody::of(facts, memory), mode) {
            (_, ResponseToPicker::Off) => return None,
            (KeptBody::Events(begin, _), ResponseToPicker::Headers) => KeptBody::Events(begin, None),
            (KeptBody::Document(..), ResponseToPicker::Headers) => return None,
            (KeptBody::Nothing, ResponseToPicker::Headers | ResponseToPicker::Usage) => return None,
            (body, _) => body,
        };
        // Text that only may be events passes as it comes.
        let events = matches!(body, KeptBody::Events(..)) && is_events(facts.headers);
        let queue = (mode == ResponseToPicker::Body).then(|| PieceQueue::new(events));
        Some(Self { body, first: FoundUsage::default(), queue })
    }

    /// The picker is told nothing more; tokens are still counted.
    pub fn untold(&mut self) {
        self.queue = None;
    }

    /// Whether user space has to see every byte.
    pub fn wants_all(&self) -> bool {
        self.queue.is_some() || matches!(self.body, KeptBody::Document(..))
    }

    /// Whether user space has to see the next bytes, because the picker has not been told the beginning.
    pub fn wants_begin(&self) -> bool {
        matches!(&self.body, KeptBody::Events(begin, _) | KeptBody::Coded(begin) if begin.is_waiting())
    }

    /// Whether the last bytes are wanted, which the kernel can keep.
    pub fn wants_end(&self) -> bool {
        matches!(self.body, KeptBody::Events(_, Some(_)))
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
        match &mut self.body {
            KeptBody::Events(begin, tail) => {
                if begin.is_waiting() {
                    begin.take(payload);
                    if tail.is_some() {
                        self.first = usage::of_events(begin.event());
                    }
                    if self.queue.is_some() {
                        begin.piece();
                    }
                }
                if let Some(tail) = tail {
                    tail.take(payload);
                }
            }
            KeptBody::Coded(begin) if !payload.is_empty() => begin.unreadable(),
            // A truncated JSON document cannot be parsed.
            KeptBody::Document(kept, _) if kept.len() + payload.len() > DOCUMENT => self.body = KeptBody::Nothing,
            KeptBody::Document(kept, share) => {
                if share.grow(payload.len() as u64) {
                    kept.extend_from_slice(payload);
                } else {
                    self.body = KeptBody::Refused;
                }
            }
            KeptBody::Coded(_) | KeptBody::Refused | KeptBody::Nothing => {}
        }
    }

    /// Notes a gap of unseen bytes, longer than what the kernel keeps.
    pub fn skipped(&mut self) {
        if let KeptBody::Events(_, Some(tail)) = &mut self.body {
            tail.skipped();
        }
    }

    /// Returns the next piece for the picker while the body is being delivered.
    pub fn next_piece(&mut self) -> Option<Bytes> {
        match (&mut self.queue, &mut self.body) {
            (Some(queue), _) => queue.next_piece(),
            (None, KeptBody::Events(begin, _) | KeptBody::Coded(begin)) => begin.piece(),
            (None, KeptBody::Document(..) | KeptBody::Refused | KeptBody::Nothing) => None,
        }
    }

    /// Whether there was no memory for what the picker was to get.
    pub fn given_up(&self) -> bool {
        self.queue.is_none() && matches!(self.body, KeptBody::Refused)
    }

    /// Returns what the picker still gets at the end of the body.
    pub fn rest(&mut self) -> Rest {
        if let Some(queue) = &mut self.queue {
            return Rest { pieces: queue.rest() };
        }
        let mut pieces: Vec<Bytes> = self.next_piece().into_iter().collect();
        let end = match std::mem::replace(&mut self.body, KeptBody::Nothing) {
            KeptBody::Document(kept, share) => share.hold(kept.freeze()),
            body => {
                self.body = body;
                self.last_events()
            }
        };
        if !end.is_empty() {
            pieces.push(end);
        }
        Rest { pieces }
    }

    /// The end of an event stream, if it is wanted.
    fn last_events(&self) -> Bytes {
        match &self.body {
            KeptBody::Events(begin, Some(tail)) => tail.end(begin.told()),
            _ => Bytes::new(),
        }
    }

    /// The tokens that the body reports, if it does. Call it before [`rest`](Self::rest).
    pub fn usage(&self) -> Option<Usage> {
        match &self.body {
            KeptBody::Events(begin, Some(tail)) => tail.usage(begin.told()).or(self.first.clone()).usage(),
            KeptBody::Document(kept, _) => usage::of_document(kept).usage(),
            KeptBody::Events(_, None) | KeptBody::Coded(_) | KeptBody::Refused | KeptBody::Nothing => None,
        }
    }
}

impl KeptBody {
    fn of(facts: &BodyFacts<'_>, memory: &Arc<Budget>) -> Self {
        let kind = media_type(facts.headers);
        let plain = !is_coded(facts.headers);
        let too_long = facts.length.is_some_and(|length| length > DOCUMENT as u64);
        let is_grpc = kind.starts_with("application/grpc");
        let is_text = kind.is_empty() || kind.starts_with("text/");
        match kind.as_str() {
            JSON if plain && !too_long => Self::Document(BytesMut::new(), memory.share()),
            JSON => Self::Nothing,
            EVENTS if plain => Self::Events(Begin::new(), Some(Tail::default())),
            EVENTS => Self::Coded(Begin::new()),
            _ if !facts.streams || is_grpc => Self::Nothing,
            _ if plain && is_text => Self::Events(Begin::new(), Some(Tail::default())),
            _ => Self::Coded(Begin::new()),
        }
    }
}

#[cfg(test)]
mod tests;
