//! A response as a list of messages, each sent by one call unless the kernel takes only part.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, Write as _};
use std::net::TcpStream;

use bytes::{Buf as _, Bytes};
use nix::sys::sendfile::sendfile64;
use socket2::SockRef;

use super::Calls;
use crate::Plan;
use crate::model_server::{Framing, Sequence};

/// Bytes per piece of a `writev` and pieces per call: an odd number, and below IOV_MAX.
const PIECE: usize = 701;
const PIECES: usize = 97;

pub(super) enum Message {
    Memory(VecDeque<Bytes>),
    File { offset: i64, len: usize },
}

impl Message {
    fn of(parts: impl Into<VecDeque<Bytes>>) -> Self {
        Self::Memory(parts.into())
    }

    fn memory(&self) -> impl Iterator<Item = &Bytes> {
        let Self::Memory(parts) = self else { return [].iter().chain(&[]) };
        let (one, two) = parts.as_slices();
        one.iter().chain(two)
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(parts) => parts.iter().map(Bytes::len).sum(),
            Self::File { len, .. } => *len,
        }
    }

    /// One call. Removes the accepted bytes from the message.
    pub(super) fn send(&mut self, mut stream: &TcpStream, file: Option<&File>, flags: i32) -> io::Result<()> {
        match self {
            Self::Memory(parts) => {
                let mut taken = match parts.len() {
                    1 => SockRef::from(&stream).send_with_flags(&parts[0], flags)?,
                    _ => stream.write_vectored(&parts.iter().map(|part| IoSlice::new(part)).collect::<Vec<_>>())?,
                };
                while taken > 0 {
                    let n = taken.min(parts[0].len());
                    parts[0].advance(n);
                    taken -= n;
                    if parts[0].is_empty() {
                        parts.pop_front();
                    }
                }
            }
            Self::File { offset, len } => {
                let file = file.ok_or(io::ErrorKind::NotFound)?;
                // The kernel advances the offset.
                *len -= sendfile64(stream, file, Some(offset), *len)?;
            }
        }
        Ok(())
    }
}

/// Head and body of one response.
pub(super) struct Messages {
    pub(super) head: Message,
    pub(super) body: VecDeque<Message>,
    pub(super) file: Option<File>,
    /// Memory lent with `MSG_ZEROCOPY` stays unchanged until the kernel reports completion.
    _lent: Vec<Bytes>,
}

impl Messages {
    pub(super) fn new(plan: &Plan, calls: Calls) -> io::Result<Self> {
        let field = match plan.framing {
            Framing::ContentLength => format!("content-length: {}\r\n", plan.size),
            Framing::Chunked => "transfer-encoding: chunked\r\n".to_owned(),
            Framing::UntilClose | Framing::None => return Err(io::Error::other("framing not supported by senders")),
        };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n{field}\r\n");
        let payload = Bytes::from(plan.alphabet.bytes(plan.stream_id, 0, plan.size as usize));
        let file = match calls {
            Calls::SendFile => {
                let mut file = tempfile::tempfile()?;
                file.write_all(&payload)?;
                Some(file)
            }
            _ => None,
        };
        let parts = match plan.framing {
            Framing::Chunked => chunks(plan, &payload),
            _ => vec![payload],
        };
        let body = match calls {
            Calls::Vectored => vectored(&parts, plan.framing == Framing::Chunked),
            Calls::SendFile => from_file(&parts, plan.framing == Framing::Chunked),
            Calls::Send(len) => cut(&parts, len),
            Calls::ZeroCopy => cut(&parts, 64 << 10),
            Calls::Turns(_) => cut(&parts, 5000),
        };
        let head = Message::of([Bytes::from(head)]);
        let lent = [&head].into_iter().chain(&body).flat_map(Message::memory).cloned().collect();
        Ok(Self { head, body, file, _lent: lent })
    }
}

/// Size, bytes and end of each chunk, and the last chunk as another three.
fn chunks(plan: &Plan, payload: &Bytes) -> Vec<Bytes> {
    let (mut lengths, mut rest, mut parts) = (Sequence::new(plan.chunks), payload.clone(), Vec::new());
    while !rest.is_empty() {
        let chunk = rest.split_to(rest.len().min(lengths.next() as usize));
        parts.push(Bytes::from(format!("{:x}\r\n", chunk.len())));
        parts.push(chunk);
        parts.push(Bytes::from_static(b"\r\n"));
    }
    parts.extend([&b"0\r\n"[..], b"", b"\r\n"].map(Bytes::from_static));
    parts
}

/// Messages of `len` bytes, without regard to their content.
fn cut(parts: &[Bytes], len: usize) -> VecDeque<Message> {
    let whole = Bytes::from(parts.concat());
    (0..whole.len()).step_by(len).map(|at| Message::of([whole.slice(at..whole.len().min(at + len))])).collect()
}

fn vectored(parts: &[Bytes], chunked: bool) -> VecDeque<Message> {
    if chunked {
        return parts.chunks(3).map(|three| Message::of(three.to_vec())).collect();
    }
    let whole = parts.concat();
    let pieces: Vec<Bytes> = whole.chunks(PIECE).map(Bytes::copy_from_slice).collect();
    pieces.chunks(PIECES).map(|pieces| Message::of(pieces.to_vec())).collect()
}

/// The payload from the file, in calls of one chunk or of 100 000 bytes; chunk framing from memory.
fn from_file(parts: &[Bytes], chunked: bool) -> VecDeque<Message> {
    let mut messages = VecDeque::new();
    let mut offset = 0;
    for (index, part) in parts.iter().enumerate() {
        if chunked && index % 3 != 1 {
            messages.push_back(Message::of([part.clone()]));
            continue;
        }
        for piece in part.chunks(100_000) {
            messages.push_back(Message::File { offset, len: piece.len() });
            offset += piece.len() as i64;
        }
    }
    messages
}
