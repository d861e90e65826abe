//! A deliberately simple decoder of body framing. It shares no code with the agent's parser, because tests compare the two. The
//! test client uses it for responses, the model server for requests.

use anyhow::{Context, Result, bail};

/// How a head delimits its body (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framed {
    Nothing,
    Length(u64),
    Chunked,
    UntilClose,
}

#[derive(Clone, Debug)]
enum State {
    Length(u64),
    UntilClose,
    /// A partial chunk-size line.
    Size(Vec<u8>),
    Data(u64),
    /// The line end after a chunk, with how many of its two bytes were read.
    DataEnd(u8),
    /// A line of the trailer section.
    Trailer(Vec<u8>),
    Complete,
}

#[derive(Clone, Debug)]
pub struct Decoder {
    state: State,
    trailers: Vec<(String, String)>,
    chunks: u64,
}

impl Decoder {
    #[must_use]
    pub fn new(framed: Framed) -> Self {
        let state = match framed {
            Framed::Nothing | Framed::Length(0) => State::Complete,
            Framed::Length(n) => State::Length(n),
            Framed::Chunked => State::Size(Vec::new()),
            Framed::UntilClose => State::UntilClose,
        };
        Self { state, trailers: Vec::new(), chunks: 0 }
    }

    #[must_use]
    pub fn complete(&self) -> bool {
        matches!(self.state, State::Complete)
    }

    /// Whether a close now would end the body correctly.
    #[must_use]
    pub fn complete_at_close(&self) -> bool {
        matches!(self.state, State::Complete | State::UntilClose)
    }

    #[must_use]
    pub fn trailers(&self) -> &[(String, String)] {
        &self.trailers
    }

    /// Chunks with data seen so far.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Consumes `input` until it is empty or the body complete, passes the payload to `sink`, and returns how many bytes were
    /// consumed. Returns an error for anything but the chunked coding of RFC 9112 §7.1.
    pub fn decode(&mut self, input: &[u8], mut sink: impl FnMut(&[u8])) -> Result<usize> {
        let mut at = 0;
        while at < input.len() && !self.complete() {
            let rest = &input[at..];
            match &mut self.state {
                State::Complete => {}
                State::UntilClose => {
                    sink(rest);
                    at += rest.len();
                }
                State::Length(left) | State::Data(left) => {
                    let n = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    sink(&rest[..n]);
                    at += n;
                    *left -= n as u64;
                    if *left == 0 {
                        let chunked = matches!(self.state, State::Data(_));
                        self.state = if chunked { State::DataEnd(0) } else { State::Complete };
                    }
                }
                State::DataEnd(seen) => {
                    let expected = b"\r\n"[usize::from(*seen)];
                    if rest[0] != expected {
                        bail!("found byte {:#04x} after a chunk, expected a line end", rest[0]);
                    }
                    at += 1;
                    *seen += 1;
                    if *seen == 2 {
                        self.state = State::Size(Vec::new());
                    }
                }
                State::Size(line) => {
                    line.push(rest[0]);
                    at += 1;
                    if let Some(line) = line.strip_suffix(b"\r\n") {
                        let size = chunk_size(line)?;
                        self.chunks += u64::from(size != 0);
                        self.state = if size == 0 { State::Trailer(Vec::new()) } else { State::Data(size) };
                    }
                }
                State::Trailer(line) => {
                    line.push(rest[0]);
                    at += 1;
                    if let Some(line) = line.strip_suffix(b"\r\n") {
                        if line.is_empty() {
                            self.state = State::Complete;
                        } else {
                            let line = String::from_utf8(line.to_vec())?;
                            let (name, value) = line.split_once(':').context("trailer without a colon")?;
                            self.trailers.push((name.to_owned(), value.trim().to_owned()));
                            self.state = State::Trailer(Vec::new());
                        }
                    }
                }
            }
        }
        Ok(at)
    }
}

fn chunk_size(line: &[u8]) -> Result<u64> {
    let line = std::str::from_utf8(line).context("chunk-size line is not UTF-8")?;
    let digits = line.split([';', ' ', '\t']).next().unwrap_or_default();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!("chunk-size line {line:?}");
    }
    u64::from_str_radix(digits, 16).with_context(|| format!("chunk-size line {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes in pieces of `step`; returns the payload, the remaining bytes and the decoder, or an error.
    fn decode(framed: Framed, wire: &[u8], step: usize) -> Option<(Vec<u8>, usize, Decoder)> {
        let mut decoder = Decoder::new(framed);
        let (mut payload, mut taken) = (Vec::new(), 0);
        for piece in wire.chunks(step) {
            taken += decoder.decode(piece, |bytes| payload.extend_from_slice(bytes)).ok()?;
        }
        Some((payload, wire.len() - taken, decoder))
    }

    #[test]
    fn decoder_input_table_gives_expected_output() {
        use Framed::*;
        /// framing, wire, payload, remaining bytes, complete, complete at close
        type Case = (Framed, &'static [u8], &'static [u8], usize, bool, bool);
        let good: &[Case] = &[
            (Nothing, b"next", b"", 4, true, true),
            (Length(0), b"next", b"", 4, true, true),
            (Length(3), b"abcnext", b"abc", 4, true, true),
            (Length(5), b"abc", b"abc", 0, false, false),
            (UntilClose, b"abc", b"abc", 0, false, true),
            (Chunked, b"3\r\nabc\r\n0\r\n\r\nnext", b"abc", 4, true, true),
            (Chunked, b"0\r\n\r\n", b"", 0, true, true),
            (Chunked, b"A;name=\"v\";x\r\n0123456789\r\n000\r\n\r\n", b"0123456789", 0, true, true),
            (Chunked, b"1 ;x\r\na\r\n1\r\nb\r\n0;last\r\nT: 1\r\nU:2 \r\n\r\n", b"ab", 0, true, true),
            (Chunked, b"3\r\nabc\r\n0\r\n", b"abc", 0, false, false),
            (Chunked, b"3\r\nabc\r\n0\r\n\r", b"abc", 0, false, false),
            (Chunked, b"3\r\nab", b"ab", 0, false, false),
        ];
        for (framed, wire, payload, left, complete, at_close) in good {
            for step in 1..=wire.len() {
                let (found, found_left, decoder) = decode(*framed, wire, step).expect("well-formed");
                let found = (found.as_slice(), found_left, decoder.complete(), decoder.complete_at_close());
                assert_eq!(found, (*payload, *left, *complete, *at_close), "{framed:?} {wire:?} by {step}");
            }
        }
        let bad: &[&[u8]] =
            &[b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"1\r\nab", b"1\r\na\n", b"1ffffffffffffffff\r\n"];
        for wire in bad {
            assert!(decode(Chunked, wire, 1).is_none(), "{wire:?}");
        }
    }

    #[test]
    fn trailers_and_chunks_are_reported() {
        let (.., decoder) =
            decode(Framed::Chunked, b"1\r\na\r\n1\r\nb\r\n0\r\nT: 1\r\nU:2 \r\n\r\n", 4).expect("well-formed");
        assert_eq!(decoder.chunks(), 2);
        assert_eq!(decoder.trailers(), [("T".to_owned(), "1".to_owned()), ("U".to_owned(), "2".to_owned())]);
    }
}
