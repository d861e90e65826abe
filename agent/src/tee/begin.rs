//! Keeps the beginning of an event stream until its first event is complete.

use bytes::{Bytes, BytesMut};

use super::events::EventScanner;

/// Longest beginning that is kept, in bytes.
pub(super) const BEGIN: usize = 16 << 10;
/// The field names of an event stream. A comment has the empty one.
const NAMES: [&[u8]; 5] = [b"data", b"event", b"id", b"retry", b""];
/// Tells that a stream has begun whose first event is too long or cannot be read: a comment, because that is not an event.
const UNREADABLE: &[u8] = b":\n\n";

#[derive(Debug)]
pub(super) struct Begin {
    scanner: EventScanner,
    kept: BytesMut,
    state: BeginState,
    /// Bytes of the payload up to the end of the first event.
    told: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BeginState {
    /// The first event is not complete.
    Waiting,
    /// It is in `kept`.
    Ready,
    Taken,
}

impl Begin {
    pub(super) fn new() -> Self {
        Self { scanner: EventScanner::new(), kept: BytesMut::new(), state: BeginState::Waiting, told: 0 }
    }

    /// Takes the next payload bytes.
    pub(super) fn take(&mut self, payload: &[u8]) {
        if self.state != BeginState::Waiting || payload.is_empty() {
            return;
        }
        let end = self.scanner.find(payload);
        let length = self.kept.len() + end.unwrap_or(payload.len());
        if length > BEGIN {
            self.unreadable();
            return;
        }
        self.kept.extend_from_slice(&payload[..end.unwrap_or(payload.len())]);
        if !may_be_events(&self.kept) {
            self.unreadable();
            return;
        }
        if end.is_some() {
            (self.state, self.told) = (BeginState::Ready, length as u64);
        }
    }

    /// The stream has begun with bytes that cannot be read.
    pub(super) fn unreadable(&mut self) {
        if self.state == BeginState::Waiting {
            self.kept = BytesMut::from(UNREADABLE);
            self.state = BeginState::Ready;
        }
    }

    /// Whether the first event has not arrived.
    pub(super) fn is_waiting(&self) -> bool {
        self.state == BeginState::Waiting
    }

    /// The first event, once it is complete, until it is taken.
    pub(super) fn event(&self) -> &[u8] {
        if self.state == BeginState::Ready { &self.kept } else { &[] }
    }

    /// Returns the beginning, once.
    pub(super) fn piece(&mut self) -> Option<Bytes> {
        if self.state != BeginState::Ready {
            return None;
        }
        self.state = BeginState::Taken;
        Some(std::mem::take(&mut self.kept).freeze())
    }

    /// Bytes of the payload that [`piece`](Self::piece) returns.
    pub(super) fn told(&self) -> u64 {
        self.told
    }
}

/// Whether an event stream may begin like this: its first line has a known name. What is something else under the type of an event
/// stream has no first event to wait for.
fn may_be_events(begin: &[u8]) -> bool {
    let begin = begin.strip_prefix("\u{feff}".as_bytes()).unwrap_or(begin);
    let line = begin.trim_ascii_start();
    match line.iter().position(|byte| matches!(byte, b':' | b'\n' | b'\r')) {
        Some(end) => NAMES.contains(&&line[..end]),
        None => NAMES.iter().any(|name| name.starts_with(line)) || "\u{feff}".as_bytes().starts_with(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pieces: &[&[u8]]) -> (Option<Bytes>, u64) {
        let mut begin = Begin::new();
        for piece in pieces {
            begin.take(piece);
        }
        let piece = begin.piece();
        assert_eq!(begin.piece(), None, "told twice");
        assert_eq!(begin.is_waiting(), piece.is_none());
        (piece, begin.told())
    }

    #[test]
    fn beginning_ends_with_first_event_at_every_cut() {
        let text = b": hello\r\n\r\nevent: a\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n";
        let first = b": hello\r\n\r\nevent: a\r\ndata: 1\r\n\r\n".len();
        for cut in 0..text.len() {
            let (one, two) = text.split_at(cut);
            let expected = Bytes::copy_from_slice(&text[..first]);
            assert_eq!(told(&[one, two]), (Some(expected), first as u64), "{cut}");
        }
        assert_eq!(told(&[&text[..first - 1]]), (None, 0));
    }

    #[test]
    fn beginning_of_something_else_is_not_waited_for() {
        let comment = (Some(Bytes::from_static(UNREADABLE)), 0);
        for text in ["x", "dat\n", "database: 1\n", "{\"a\":1}", "\n\nhello", "\u{0}\u{1}", "\u{feff}x", "id-7:"] {
            assert_eq!(told(&[text.as_bytes()]), comment, "{text:?}");
        }
        for text in ["", "d", "data", "data:", "event: x\n", "\u{feff}", "\u{feff}id", "\n", "\r\nretry:1", ":", "id\n"]
        {
            assert_eq!(told(&[text.as_bytes()]), (None, 0), "{text:?}");
        }
        assert_eq!(told(&[b"\xef"]), (None, 0));
    }

    #[test]
    fn long_or_unreadable_beginning_is_told_as_comment() {
        let comment = (Some(Bytes::from_static(UNREADABLE)), 0);
        let event = |len: usize| format!("data: {}\n\n", "x".repeat(len - 8)).into_bytes();
        assert_eq!(told(&[&event(BEGIN)]), (Some(event(BEGIN).into()), BEGIN as u64));
        assert_eq!(told(&[&event(BEGIN + 1)]), comment);
        assert_eq!(told(&event(BEGIN + 1).chunks(1000).collect::<Vec<_>>()), comment);
        let mut begin = Begin::new();
        begin.unreadable();
        begin.unreadable();
        assert_eq!((begin.piece(), begin.piece()), (comment.0, None));
    }
}
