//! Splits an event stream into its lines (WHATWG HTML §9.2.6), in pieces of any size.

const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];
const DATA: &[u8] = b"data";

/// What some bytes of the stream are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Part of the value of a `data` field.
    Data,
    /// Field names, other fields and comments.
    Other,
    /// A line break, or half of one.
    LineEnd,
    /// The break of an empty line, or its first half, which ends an event.
    EventEnd,
}

#[derive(Debug, Clone, Copy)]
enum LineState {
    /// At the start of the stream, after this many bytes of a byte order mark.
    Start(usize),
    /// After this many bytes of `data` at the start of a line.
    Name(usize),
    /// After the colon of `data:`, where a space may follow.
    Colon,
    Data,
    Other,
}

#[derive(Debug)]
pub(super) struct Lines {
    state: LineState,
    /// The last byte was a carriage return.
    after_return: bool,
}

impl Default for Lines {
    fn default() -> Self {
        Self { state: LineState::Start(0), after_return: false }
    }
}

impl Lines {
    /// Calls `take` for each part of `bytes`, in order and without gaps.
    pub(super) fn split(&mut self, mut bytes: &[u8], mut take: impl FnMut(Part, &[u8])) {
        while let Some(&first) = bytes.first() {
            let (length, part) = self.step(first, bytes);
            let (these, rest) = bytes.split_at(length);
            take(part, these);
            bytes = rest;
        }
    }

    /// The length and meaning of the next part; `first` is the first of `bytes`.
    fn step(&mut self, first: u8, bytes: &[u8]) -> (usize, Part) {
        let after_return = std::mem::take(&mut self.after_return);
        if matches!(first, b'\r' | b'\n') {
            if first == b'\n' && after_return {
                return (1, Part::LineEnd);
            }
            self.after_return = first == b'\r';
            let empty = matches!(self.state, LineState::Start(0 | 3) | LineState::Name(0));
            self.state = LineState::Name(0);
            return (1, if empty { Part::EventEnd } else { Part::LineEnd });
        }
        let run = || bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
        match self.state {
            LineState::Start(known) if BYTE_ORDER_MARK.get(known) == Some(&first) => {
                self.state = LineState::Start(known + 1);
                (1, Part::Other)
            }
            LineState::Start(0 | 3) | LineState::Name(_) => {
                let known = if let LineState::Name(known) = self.state { known } else { 0 };
                self.state = match (DATA.get(known), first) {
                    (Some(&expected), _) if expected == first => LineState::Name(known + 1),
                    (None, b':') => LineState::Colon,
                    _ => LineState::Other,
                };
                (1, Part::Other)
            }
            LineState::Colon => {
                self.state = LineState::Data;
                (1, if first == b' ' { Part::Other } else { Part::Data })
            }
            LineState::Data => (run(), Part::Data),
            LineState::Start(_) | LineState::Other => {
                self.state = LineState::Other;
                (run(), Part::Other)
            }
        }
    }
}
