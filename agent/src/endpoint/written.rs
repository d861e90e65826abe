//! What has been written of the requests on one HTTP/2 connection to an endpoint. Tells for each request whether acknowledged bytes
//! of the connection, which all requests share, are progress of this request.

use std::collections::HashMap;

use crate::http::frame_heads::{FrameHeads, PREFACE, kind};

pub(super) struct WrittenRequests {
    frames: FrameHeads,
    /// Bytes of the connection, plus one for the SYN, as in the kernel's count of acknowledged bytes.
    offset: u64,
    /// h2 has more bytes than the socket takes.
    blocked: bool,
    requests: HashMap<u32, WrittenRequest>,
}

#[derive(Default)]
struct WrittenRequest {
    /// Bytes of DATA; `None` before the head.
    bytes: Option<u64>,
    /// The connection's offset where the last frame ends.
    end: u64,
}

impl WrittenRequests {
    /// A connection on which nothing has been written, not even the preface.
    pub(super) fn new() -> Self {
        Self { frames: FrameHeads::after(PREFACE), offset: 1, blocked: false, requests: HashMap::new() }
    }

    /// Starts to count the request of this stream. None of it has been written.
    pub(super) fn open(&mut self, stream: u32) {
        self.requests.insert(stream, WrittenRequest::default());
    }

    pub(super) fn close(&mut self, stream: u32) {
        self.requests.remove(&stream);
    }

    /// Records that the socket has taken none of the bytes that h2 has.
    pub(super) fn was_blocked(&mut self) {
        self.blocked = true;
    }

    /// Records bytes that the socket has taken.
    pub(super) fn wrote(&mut self, bytes: &[u8]) {
        self.offset += bytes.len() as u64;
        self.blocked = false;
        let (offset, requests) = (self.offset, &mut self.requests);
        self.frames.locate(bytes, |frame, left| {
            let Some(request) = requests.get_mut(&frame.stream) else { return };
            if !matches!(frame.kind, kind::HEADERS | kind::CONTINUATION | kind::DATA) {
                return;
            }
            let bytes = request.bytes.get_or_insert(0);
            if frame.kind == kind::DATA {
                *bytes += frame.length as u64;
            }
            request.end = offset - left as u64 + frame.length as u64;
        });
    }

    /// A number that grows with each acknowledged byte that is progress of this request, of which h2 has the head and `given` bytes of
    /// the body: each byte of the connection up to its last frame, and while the socket keeps the rest of the request back, every byte.
    /// While the request waits for a window, or for a place among the endpoint's streams, the number stays the same.
    pub(super) fn reached(&self, stream: u32, given: u64, acknowledged: u64) -> u64 {
        match self.requests.get(&stream) {
            Some(request) if !self.blocked || request.bytes.is_some_and(|bytes| bytes >= given) => {
                acknowledged.min(request.end)
            }
            _ => acknowledged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u8, length: usize) -> Vec<u8> {
        let mut bytes = (length as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0, 0, 0, 0, stream]);
        bytes.resize(bytes.len() + length, 0xa5);
        bytes
    }

    #[test]
    fn acknowledged_bytes_count_up_to_the_last_frame_of_the_request() {
        for piece in [1, 100, 10_000] {
            count(piece);
        }
    }

    /// The request and frames of others are written in pieces of this length.
    fn count(piece: usize) {
        let mut written = WrittenRequests::new();
        written.open(1);
        // The head waits in h2 for the socket: everything before it has to arrive.
        written.was_blocked();
        assert_eq!(written.reached(1, 0, 7), 7);
        let own = [vec![b'P'; PREFACE], frame(kind::HEADERS, 1, 20), frame(kind::DATA, 1, 1000)].concat();
        let (first, rest) = own.split_at(PREFACE + 4);
        written.wrote(first);
        // The head waits for the endpoint's permission: no byte of others is progress.
        assert_eq!(written.reached(1, 0, 7), 0);
        // Frames of others and the buffer's length change nothing.
        let buffer = [rest, &frame(kind::DATA, 3, 5000), &frame(8, 1, 4), &frame(8, 0, 4)].concat();
        for bytes in buffer.chunks(piece) {
            written.wrote(bytes);
        }
        let end = 1 + own.len() as u64;
        assert_eq!(written.reached(1, 1000, 1), 1);
        assert_eq!(written.reached(1, 1000, u64::MAX), end);
        // More of the body waits in h2, for a window or for the socket.
        assert_eq!(written.reached(1, 1001, 6000), end);
        written.was_blocked();
        assert_eq!(written.reached(1, 1001, 6000), 6000);
        let before = written.offset;
        written.wrote(&[frame(kind::DATA, 1, 1), frame(6, 0, 8)].concat());
        assert_eq!(written.reached(1, 1001, u64::MAX), before + 10);
        written.close(1);
        assert!(written.requests.is_empty());
    }
}
