//! Where the events of an event stream end, and their data (WHATWG HTML §9.2.6).
//!
//! Takes the stream in pieces of any size; the result does not depend on how it is cut. Lines end with LF, CR or CRLF. A block
//! without a `data` field is a comment or a keep-alive and does not count as an event.

use std::borrow::Cow;

const DATA: &[u8] = b"data";
/// May come before the first line.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Finds the end of each event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventScanner {
    state: EventState,
    /// The event has data.
    has_data: bool,
    /// What counts as an event.
    blocks: Blocks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocks {
    /// Those with data.
    WithData,
    /// Also those without: data may have come before the scan began.
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EventState {
    /// At the start of the stream, after so many bytes of a byte order mark.
    Bom(usize),
    /// At the start of a line. `crlf`: the line before ended with CRLF.
    Start { crlf: bool },
    /// In a line whose first bytes are this many of `data`.
    Name(usize),
    /// In the rest of a line.
    Rest,
    /// After the CR of a line; its LF may follow.
    Cr,
    /// After the CR of a blank line in a stream whose lines end with CRLF; its LF should follow.
    BlankCr,
}

impl EventScanner {
    /// For the start of a stream.
    pub(super) fn new() -> Self {
        Self { state: EventState::Bom(0), has_data: false, blocks: Blocks::WithData }
    }

    /// For the start of a stream, whose blocks without data count, too.
    pub(super) fn of_blocks() -> Self {
        Self { blocks: Blocks::All, ..Self::new() }
    }

    /// For a piece that begins inside an event.
    fn inside() -> Self {
        Self { state: EventState::Rest, has_data: true, blocks: Blocks::All }
    }

    /// Reads up to the end of the next event. Returns the number of bytes up to there, and `None` after all of `bytes` if the event
    /// goes on. The number is 0 if the event ended before `bytes`.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.state == EventState::Rest {
                at += bytes[at..].iter().position(|byte| matches!(byte, b'\n' | b'\r'))?;
            }
            match self.step(bytes[at]) {
                ScanStep::On => at += 1,
                ScanStep::Again => {}
                ScanStep::EndHere => return Some(at + 1),
                ScanStep::EndBefore => return Some(at),
            }
        }
        None
    }

    fn step(&mut self, byte: u8) -> ScanStep {
        match (self.state, byte) {
            (EventState::Bom(n), _) if byte == BOM[n] => {
                self.state = if n + 1 < BOM.len() { EventState::Bom(n + 1) } else { EventState::Start { crlf: false } };
            }
            (EventState::Bom(n), _) => {
                self.state = if n == 0 { EventState::Start { crlf: false } } else { EventState::Rest };
                return ScanStep::Again;
            }
            (EventState::Start { .. }, b'\n') => return self.end(ScanStep::EndHere),
            (EventState::Start { crlf: true }, b'\r') => self.state = EventState::BlankCr,
            (EventState::Start { crlf: false }, b'\r') => return self.end(ScanStep::EndHere),
            (EventState::Start { .. }, _) => {
                self.state = EventState::Name(0);
                return ScanStep::Again;
            }
            (EventState::Name(_) | EventState::Rest, b'\n' | b'\r') => {
                self.has_data |= self.state == EventState::Name(DATA.len());
                self.state = if byte == b'\n' { EventState::Start { crlf: false } } else { EventState::Cr };
            }
            (EventState::Name(n), _) if n < DATA.len() && byte == DATA[n] => self.state = EventState::Name(n + 1),
            (EventState::Name(n), _) => {
                self.has_data |= n == DATA.len() && byte == b':';
                self.state = EventState::Rest;
            }
            (EventState::Rest, _) => {}
            (EventState::Cr, b'\n') => self.state = EventState::Start { crlf: true },
            (EventState::Cr, _) => {
                self.state = EventState::Start { crlf: false };
                return ScanStep::Again;
            }
            (EventState::BlankCr, b'\n') => return self.end(ScanStep::EndHere),
            (EventState::BlankCr, _) => return self.end(ScanStep::EndBefore),
        }
        ScanStep::On
    }

    /// A blank line has ended.
    fn end(&mut self, step: ScanStep) -> ScanStep {
        self.state = EventState::Start { crlf: false };
        if self.blocks == Blocks::All || std::mem::take(&mut self.has_data) {
            return step;
        }
        if matches!(step, ScanStep::EndBefore) { ScanStep::Again } else { ScanStep::On }
    }
}

enum ScanStep {
    /// The byte was read.
    On,
    /// The byte is still to be read.
    Again,
    EndHere,
    EndBefore,
}

/// Splits the end of a stream, cut at any byte, after its first event end: into the rest of an event and whole events.
pub(super) fn split_cut(text: &[u8]) -> (&[u8], &[u8]) {
    let mut scanner = EventScanner::inside();
    let mut end = scanner.find(text).unwrap_or(text.len());
    // The LF of a blank line whose CR is the last byte of the event.
    if text[..end].ends_with(b"\r") && text[end..].starts_with(b"\n") {
        end += 1;
    }
    text.split_at(end)
}

/// The lines of a text, without their ends. A CRLF yields an empty line more.
pub(super) fn lines(text: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    text.split(|&byte| byte == b'\n' || byte == b'\r')
}

/// The text without a byte order mark at its start.
pub(super) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// The value of a line's `data` field.
pub(crate) fn data(line: &[u8]) -> Option<&[u8]> {
    match without_bom(line).strip_prefix(DATA)? {
        [] => Some(&[]),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

/// The data of each event, from the last to the first. An event at the end counts without its blank line.
pub(super) fn data_from_last(text: &[u8]) -> Vec<Cow<'_, [u8]>> {
    let (mut scanner, mut rest, mut all) = (EventScanner::new(), text, Vec::new());
    loop {
        let end = scanner.find(rest);
        let (event, after) = rest.split_at(end.unwrap_or(rest.len()));
        let mut data_lines = lines(event).filter_map(data);
        if let Some(first) = data_lines.next() {
            let joined = data_lines.fold(Cow::Borrowed(first), |mut joined, line| {
                joined.to_mut().push(b'\n');
                joined.to_mut().extend_from_slice(line);
                joined
            });
            all.push(joined);
        }
        rest = after;
        if end.is_none() {
            all.reverse();
            return all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a text that arrives in pieces that end at these places.
    fn events(text: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
        let (mut scanner, mut event, mut all, mut from) = (EventScanner::new(), Vec::new(), Vec::new(), 0);
        for to in cuts.iter().copied().chain([text.len()]) {
            let mut piece = &text[from..to];
            while let Some(end) = scanner.find(piece) {
                event.extend_from_slice(&piece[..end]);
                all.push(std::mem::take(&mut event));
                piece = &piece[end..];
            }
            event.extend_from_slice(piece);
            from = to;
        }
        all.push(event);
        all
    }

    #[test]
    fn events_end_at_blank_lines_however_they_are_cut() {
        let rows: &[(&str, &[&str])] = &[
            ("data: a\n\ndata: b\n\nda", &["data: a\n\n", "data: b\n\n", "da"]),
            ("data: a\r\n\r\ndata: b\r\n\r\n", &["data: a\r\n\r\n", "data: b\r\n\r\n", ""]),
            ("data: a\r\rdata: b\r\r", &["data: a\r\r", "data: b\r\r", ""]),
            ("\u{feff}data: a\n\ndata: b\n\n", &["\u{feff}data: a\n\n", "data: b\n\n", ""]),
            ("\u{fe80}data: a\n\ndata: b\n\n", &["\u{fe80}data: a\n\ndata: b\n\n", ""]),
            ("event: e\ndata:a\ndata:b\n\nx", &["event: e\ndata:a\ndata:b\n\n", "x"]),
            (": comment\n\n: more\n\ndata: a\n\n", &[": comment\n\n: more\n\ndata: a\n\n", ""]),
            ("data\n\ndatax: 1\n\ndata: a\n\n", &["data\n\n", "datax: 1\n\ndata: a\n\n", ""]),
            ("dat: 1\n\nid: 1\ndata:\n\n", &["dat: 1\n\nid: 1\ndata:\n\n", ""]),
            // Mixed line ends: a CR that ends a blank line after an LF or a CR is the end.
            ("data: a\n\r\ndata: b\n\n", &["data: a\n\r", "\ndata: b\n\n", ""]),
            ("data: a\r\n\ndata: b\r\n\rdata: c", &["data: a\r\n\n", "data: b\r\n\r", "data: c"]),
            ("\n\n\r\r\r\n\r\ndata: a\n\n", &["\n\n\r\r\r\n\r\ndata: a\n\n", ""]),
        ];
        for (text, expected) in rows {
            let expected: Vec<_> = expected.iter().map(|event| event.as_bytes().to_vec()).collect();
            let bytes = text.as_bytes();
            assert_eq!(events(bytes, &[]), expected, "{text:?}");
            assert_eq!(events(bytes, &(0..bytes.len()).collect::<Vec<_>>()), expected, "{text:?} byte by byte");
            for cut in 0..bytes.len() {
                assert_eq!(events(bytes, &[cut]), expected, "{text:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn cut_text_is_split_after_its_first_event_end() {
        for end in ["\n", "\r\n", "\r"] {
            let text = format!("data: one{end}{end}data: two{end}{end}data: three{end}{end}");
            let begins: Vec<_> = text.match_indices("data").map(|(at, _)| at).chain([text.len()]).collect();
            for cut in 1..text.len() {
                let whole = split_cut(&text.as_bytes()[cut..]).1;
                // A cut inside a blank line may take one more event for the rest of the one before.
                let next = begins.iter().position(|&begin| begin >= cut).unwrap();
                let found = text.len() - whole.len();
                assert!(begins[next..].iter().take(2).any(|&begin| begin == found), "{text:?} cut at {cut}: {found}");
                assert!(whole.is_empty() || whole.starts_with(b"data: "), "{text:?} cut at {cut}");
            }
        }
        assert_eq!(split_cut(b"no end"), (b"no end".as_slice(), b"".as_slice()));
        assert_eq!(split_cut(b""), (b"".as_slice(), b"".as_slice()));
    }

    #[test]
    fn data_is_joined_from_lines_of_one_event() {
        let data = |text: &'static str| {
            let all = data_from_last(text.as_bytes()).into_iter();
            all.map(|data| String::from_utf8(data.into_owned()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(data("data: a\ndata:b\ndata\n\nid: 1\r\ndata:  c\r\n\r\n: no\n\ndata: d"), ["d", " c", "a\nb\n"]);
        assert_eq!(data("event: x\n\nevent: y\n\n"), Vec::<String>::new());
    }
}
