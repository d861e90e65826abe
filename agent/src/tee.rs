//! Copies what a picker wants of a response body: its beginning, and its end with the token counts or every byte.
//!
//! Takes the payload in order, whichever path carries it. Returns pieces for the picker's stream and, at the end of the body, the
//! rest. The client never waits for it: pieces wait in a bounded queue, and a picker that does not take them gets no more of this
//! response. A `Tee` exists only if a pool's picker wants one.

mod begin;
mod cut;
mod events;
mod queue;
mod tail;
mod usage;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use penstock_common::framing::Framing;

pub use usage::Usage;

use self::{begin::Begin, queue::Queue, tail::Tail, usage::Found};
use crate::config::ResponseToPicker;

/// Maximum size of a JSON document that is kept, in bytes; it has to be complete to be parsed.
const DOCUMENT: usize = 256 << 10;

#[derive(Debug)]
pub struct Tee {
    body: Body,
    /// What the first event of a stream reports.
    first: Found,
    /// In mode `body`: pieces that the picker has not taken yet.
    queue: Option<Queue>,
}

/// The facts about a response that say how its body is read.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub headers: &'a HeaderMap,
    /// The declared length of the body, in bytes.
    pub length: Option<u64>,
    /// The request asked for a stream.
    pub streams: bool,
}

/// What is kept of a body.
#[derive(Debug)]
enum Body {
    /// The first event of an event stream, and the last ones unless only the beginning is wanted.
    Events(Begin, Option<Tail>),
    /// That a stream has begun which cannot be read.
    Coded(Begin),
    /// A complete JSON document.
    Document(BytesMut),
    Nothing,
}

/// What the picker still gets at the end of a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Rest {
    pub pieces: Vec<Bytes>,
    /// Whether the picker has then got what it was to get. If not, it must not take the end for the end of the body.
    pub complete: bool,
}

/// For a body of which nothing is told.
impl Default for Rest {
    fn default() -> Self {
        Self { pieces: Vec::new(), complete: true }
    }
}

impl Tee {
    /// Returns `None` if the picker only needs to know that the body ended.
    pub fn new(mode: ResponseToPicker, facts: &Facts<'_>, queue_limit: usize) -> Option<Self> {
        let body = match (Body::of(facts), mode) {
            (_, ResponseToPicker::Off) => return None,
            (Body::Events(begin, _), ResponseToPicker::Headers) => Body::Events(begin, None),
            (Body::Document(_), ResponseToPicker::Headers) => return None,
            (Body::Nothing, ResponseToPicker::Headers | ResponseToPicker::Usage) => return None,
            (body, _) => body,
        };
        let events = matches!(body, Body::Events(..));
        let queue = (mode == ResponseToPicker::Body).then(|| Queue::new(queue_limit, events));
        Some(Self { body, first: Found::default(), queue })
    }

    /// Whether user space has to see every byte.
    pub fn wants_all(&self) -> bool {
        self.queue.is_some() || matches!(self.body, Body::Document(_))
    }

    /// Whether user space has to see the next bytes, because the picker has not been told the beginning.
    pub fn wants_begin(&self) -> bool {
        matches!(&self.body, Body::Events(begin, _) | Body::Coded(begin) if begin.is_waiting())
    }

    /// Whether the last bytes are wanted, which the kernel can keep.
    pub fn wants_end(&self) -> bool {
        matches!(self.body, Body::Events(_, Some(_)))
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
            Body::Events(begin, tail) => {
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
            Body::Coded(begin) if !payload.is_empty() => begin.unreadable(),
            // A truncated JSON document cannot be parsed.
            Body::Document(kept) if kept.len() + payload.len() > DOCUMENT => self.body = Body::Nothing,
            Body::Document(kept) => kept.extend_from_slice(payload),
            Body::Coded(_) | Body::Nothing => {}
        }
    }

    /// Notes a gap of unseen bytes, longer than what the kernel keeps.
    pub fn skipped(&mut self) {
        if let Body::Events(_, Some(tail)) = &mut self.body {
            tail.skipped();
        }
    }

    /// Returns the next piece for the picker while the body is being delivered.
    pub fn next_piece(&mut self) -> Option<Bytes> {
        match (&mut self.queue, &mut self.body) {
            (Some(queue), _) => queue.next_piece(),
            (None, Body::Events(begin, _) | Body::Coded(begin)) => begin.piece(),
            (None, Body::Document(_) | Body::Nothing) => None,
        }
    }

    /// Whether the picker did not take its pieces in time.
    pub fn given_up(&self) -> bool {
        self.queue.as_ref().is_some_and(Queue::given_up)
    }

    /// Returns what the picker still gets at the end of the body.
    pub fn rest(&mut self) -> Rest {
        if let Some(queue) = &mut self.queue {
            return Rest { pieces: queue.rest(), complete: !queue.given_up() };
        }
        let mut pieces: Vec<Bytes> = self.next_piece().into_iter().collect();
        let end = match &mut self.body {
            Body::Events(begin, Some(tail)) => tail.end(begin.told()),
            Body::Document(kept) => std::mem::take(kept).freeze(),
            Body::Events(_, None) | Body::Coded(_) | Body::Nothing => Bytes::new(),
        };
        if !end.is_empty() {
            pieces.push(end);
        }
        Rest { pieces, complete: true }
    }

    /// The tokens that the body reports, if it does. Call it before [`rest`](Self::rest).
    pub fn usage(&self) -> Option<Usage> {
        match &self.body {
            Body::Events(begin, Some(tail)) => tail.usage(begin.told()).or(self.first.clone()).usage(),
            Body::Document(kept) => usage::of_document(kept).usage(),
            Body::Events(_, None) | Body::Coded(_) | Body::Nothing => None,
        }
    }
}

impl Body {
    fn of(facts: &Facts<'_>) -> Self {
        let text = |name| facts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = text(header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let plain = matches!(text(header::CONTENT_ENCODING), "" | "identity");
        let too_long = facts.length.is_some_and(|length| length > DOCUMENT as u64);
        let is_grpc = kind.starts_with("application/grpc");
        let is_text = kind.is_empty() || kind.starts_with("text/");
        match kind.as_str() {
            "application/json" if plain && !too_long => Self::Document(BytesMut::new()),
            "application/json" => Self::Nothing,
            "text/event-stream" if plain => Self::Events(Begin::new(), Some(Tail::default())),
            "text/event-stream" => Self::Coded(Begin::new()),
            _ if !facts.streams || is_grpc => Self::Nothing,
            _ if plain && is_text => Self::Events(Begin::new(), Some(Tail::default())),
            _ => Self::Coded(Begin::new()),
        }
    }
}

#[cfg(test)]
mod tests;
