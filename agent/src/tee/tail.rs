//! Keeps the last bytes of an event stream, and says what of them a picker is told at the end: whole lines.

use bytes::{Bytes, BytesMut};
use penstock_common::tail::TAIL;

use super::{
    cut, events,
    usage::{self, FoundUsage},
};

#[derive(Debug, Default)]
pub(super) struct Tail {
    /// The last bytes so far.
    kept: BytesMut,
    /// Where `kept` begins in the payload, unless there was a gap.
    from: u64,
    gap: bool,
}

impl Tail {
    /// Takes the next payload bytes.
    pub(super) fn take(&mut self, payload: &[u8]) {
        let limit = TAIL as usize;
        let new = &payload[payload.len().saturating_sub(limit)..];
        let surplus = (self.kept.len() + new.len()).saturating_sub(limit);
        self.from += (surplus + payload.len() - new.len()) as u64;
        let _ = self.kept.split_to(surplus);
        self.kept.extend_from_slice(new);
    }

    /// Notes a gap of unseen bytes, longer than the tail: what was kept before it is dropped.
    pub(super) fn skipped(&mut self) {
        self.kept.clear();
        self.gap = true;
    }

    /// What to tell at the end, after the first `told` bytes of the payload were told: the last whole events. If the usage is in an
    /// event of which only the end was kept, its whole lines or a small event with that usage come first.
    pub(super) fn end(&self, told: u64) -> Bytes {
        if !self.gap && self.from <= told {
            let told = usize::try_from(told - self.from).unwrap_or(usize::MAX).min(self.kept.len());
            return Bytes::copy_from_slice(&self.kept[told..]);
        }
        let (cut, whole) = events::split_cut(&self.kept);
        if usage::of_events(whole).has_usage() {
            return Bytes::copy_from_slice(whole);
        }
        [usage_of(cut), whole.to_vec()].concat().into()
    }

    /// What the tail reports after the first `told` bytes.
    pub(super) fn usage(&self, told: u64) -> FoundUsage {
        usage::of_events(&self.end(told))
    }
}

/// Lines with the usage of an event whose beginning is missing; empty if it has none.
fn usage_of(cut: &[u8]) -> Vec<u8> {
    let first = cut.iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(cut.len());
    let (rest_of_line, lines) = cut.split_at(first);
    let mut joined = rest_of_line.to_vec();
    let mut at = first;
    for line in events::lines(lines) {
        if let Some(data) = events::data(line) {
            if usage::of_event(data).has_usage() {
                return cut[at..].to_vec();
            }
            joined.push(b'\n');
            joined.extend_from_slice(data);
        }
        at += line.len() + 1;
    }
    cut::with_usage_only(&joined).map_or_else(Vec::new, |data| format!("data: {data}\n\n").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The end of a stream of which everything up to `told` was told, taken in pieces of `piece` bytes.
    fn end(text: &str, told: usize, piece: usize) -> String {
        let mut tail = Tail::default();
        text.as_bytes().chunks(piece).for_each(|piece| tail.take(piece));
        String::from_utf8(tail.end(told as u64).to_vec()).unwrap()
    }

    const USAGE: &str = r#""usage":{"input_tokens":5,"output_tokens":7}"#;

    #[test]
    fn told_beginning_is_not_told_again() {
        let (first, second) = ("data: 1\n\n", "data: 2\n\n");
        for piece in [1, 3, 100] {
            assert_eq!(end(&[first, second].concat(), first.len(), piece), second);
            assert_eq!(end(first, first.len(), piece), "");
            assert_eq!(end(first, 0, piece), first);
        }
        // One byte more than the tail: the next event begins with the tail, or one byte before.
        let filler = |len: usize| format!("data: {}\n\n", "x".repeat(len - 8));
        for (over, kept) in [(0, true), (1, false)] {
            let long = filler(TAIL as usize - second.len() + over);
            let expected = if kept { [&long, second].concat() } else { second.to_owned() };
            assert_eq!(end(&[first, &long, second].concat(), first.len(), 500), expected, "{over}");
        }
    }

    #[test]
    fn whole_events_with_usage_are_told_as_they_are() {
        let last = format!("event: x\ndata: {{{USAGE}}}\n\ndata: [DONE]\n\n");
        let text = ["data: {}\n\n".repeat(1000), last.clone()].concat();
        for piece in [1, 7, 4000, 100_000] {
            let told = end(&text, 10, piece);
            assert!(told.ends_with(&last) && told.starts_with("data: {}\n\n") && told.len() <= TAIL as usize, "{told}");
        }
    }

    /// The last event gets longer by one byte at a time, so that the tail begins at each of its bytes.
    #[test]
    fn usage_of_event_longer_than_tail_is_told_at_every_cut() {
        let padding = "x".repeat(TAIL as usize);
        for end_of_line in ["\n", "\r\n", "\r"] {
            for last in (0..100).chain(TAIL as usize - 300..TAIL as usize - 200) {
                let text = &padding[..last];
                let data = format!(
                    r#"{{"type":"response.completed","response":{{"text":"{padding}",{USAGE},"user":"{text}"}}}}"#
                );
                let stream = format!(
                    "data: 1{end_of_line}{end_of_line}event: response.completed{end_of_line}data: {data}{end_of_line}{end_of_line}"
                );
                let told = end(&stream, 10, 1000);
                let expected = format!(r#"data: {{"response":{{{USAGE}}},"type":"response.completed"}}"#);
                assert_eq!(told, format!("{expected}\n\n"), "{end_of_line:?} {last}");
            }
        }
        // The usage itself is cut: nothing is told.
        let data = format!(r#"{{"response":{{{USAGE},"text":"{padding}"}}}}"#);
        assert_eq!(end(&format!("data: 1\n\ndata: {data}\n\n"), 9, 1000), "");
    }

    #[test]
    fn whole_lines_of_cut_event_are_told() {
        let long = "x".repeat(TAIL as usize - 60);
        let stream = format!("data: 1\n\n: {long}\n: {long}\nevent: e\ndata: {{{USAGE}}}\n\ndata: [DONE]\n\n");
        assert_eq!(end(&stream, 9, 1000), format!("data: {{{USAGE}}}\n\ndata: [DONE]\n\n"));
        // Data in several lines.
        let stream = format!("data: 1\n\ndata: {{\"text\":\"{long}{long}\",\ndata: {USAGE}\ndata: }}\n\n");
        assert_eq!(end(&stream, 9, 1000), format!("data: {{{USAGE}}}\n\n"));
        // No usage: the whole events alone.
        let stream = format!("data: 1\n\ndata: {long}{long}\n\ndata: [DONE]\n\n");
        assert_eq!(end(&stream, 9, 1000), "data: [DONE]\n\n");
    }

    #[test]
    fn bytes_before_gap_are_dropped() {
        let mut tail = Tail::default();
        tail.take(b"data: early\n\n");
        tail.skipped();
        tail.take(b"rest of an event\n\ndata: [DONE]\n\n");
        assert_eq!(tail.end(13), "data: [DONE]\n\n");
    }
}
