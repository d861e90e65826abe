//! A body on its way to a picker that answers for it. An event stream is cut at its blank lines, so that each piece consists of whole
//! lines, and comments that keep the connection alive wait for no event. The caller takes the pieces before it reads more.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::events::EventScanner;

/// Longest incomplete event that is held back, in bytes.
const HELD: usize = 16 << 10;
/// Longest piece that consists of several events, in bytes. A message to a picker holds a little more.
const PIECE: usize = 60_000;

#[derive(Debug)]
pub(super) struct PieceQueue {
    pieces: VecDeque<Bytes>,
    /// For an event stream.
    scanner: Option<EventScanner>,
    /// The end of an event stream that is not in a piece yet.
    held: BytesMut,
}

impl PieceQueue {
    pub(super) fn new(events: bool) -> Self {
        let scanner = events.then(EventScanner::of_blocks);
        Self { pieces: VecDeque::new(), scanner, held: BytesMut::new() }
    }

    pub(super) fn push(&mut self, payload: &[u8]) {
        let before = self.held.len();
        self.held.extend_from_slice(payload);
        let Some(scanner) = &mut self.scanner else { return self.cut(self.held.len()) };
        let (mut scanned, mut ends) = (before, Vec::new());
        while let Some(end) = scanner.find(&self.held[scanned..]) {
            scanned += end;
            ends.push(scanned);
        }
        let mut done = 0;
        for (number, &end) in ends.iter().enumerate() {
            if ends.get(number + 1).is_none_or(|next| next - done > PIECE) {
                self.cut(end - done);
                done = end;
            }
        }
        if self.held.len() > HELD {
            self.cut(self.held.len());
        }
    }

    /// Makes a piece of the first held bytes.
    fn cut(&mut self, bytes: usize) {
        if bytes > 0 {
            self.pieces.push_back(self.held.split_to(bytes).freeze());
        }
    }

    pub(super) fn next_piece(&mut self) -> Option<Bytes> {
        self.pieces.pop_front()
    }

    /// Returns the remaining pieces of a body that has ended.
    pub(super) fn rest(&mut self) -> Vec<Bytes> {
        self.cut(self.held.len());
        std::mem::take(&mut self.pieces).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &[u8], cut: usize) -> Vec<Bytes> {
        let (mut queue, mut all) = (PieceQueue::new(true), Vec::new());
        for piece in text.chunks(cut) {
            queue.push(piece);
            all.extend(std::iter::from_fn(|| queue.next_piece()));
        }
        all.extend(queue.rest());
        all
    }

    #[test]
    fn pieces_of_event_stream_end_between_events() {
        let events: String = (0..5000).map(|n| format!("event: e\ndata: {n}\n\n")).collect();
        for cut in [1, 5, 1000, events.len()] {
            let all = pieces(events.as_bytes(), cut);
            assert_eq!(all.concat(), events.as_bytes());
            assert!(all.iter().all(|piece| piece.ends_with(b"\n\n") && piece.len() <= PIECE), "{cut}");
        }
    }

    #[test]
    fn comment_is_a_piece_of_its_own() {
        for (text, expected) in [
            (": ping\n\ndata: 1\n\n", [": ping\n\n", "data: 1\n\n"]),
            ("retry: 5\r\n\r\n:\r\n\r\n", ["retry: 5\r\n\r\n", ":\r\n\r\n"]),
        ] {
            assert_eq!(pieces(text.as_bytes(), 1), expected);
        }
    }

    #[test]
    fn long_event_is_cut() {
        let event = format!("data: {}\n\n", "x".repeat(3 * HELD));
        let all = pieces(event.as_bytes(), 1000);
        assert_eq!((all.len(), all.concat()), (3, event.into_bytes()));
    }
}
