//! Hides empty DATA frames that end no stream from h2, which closes a connection at the 101st of its life. They carry nothing, and
//! some libraries send one for each empty piece of a body.
//!
//! Such a frame gets a type that RFC 9113 §5.5 makes h2 ignore. All other bytes stay as they are. Padded frames are left alone,
//! because their padding counts towards windows.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame_heads::{END_STREAM, PADDED, kind};

/// A frame type that is not assigned.
const IGNORED: u8 = 0xff;
/// Length of a frame's head.
const HEAD: usize = 9;

/// The place in a byte stream of frames, which is read through [`poll_read`](Self::poll_read).
pub struct EmptyData {
    /// Bytes left before the next head.
    skip: usize,
    /// The part of a head that has been read, if a read ended in it.
    cut: Vec<u8>,
    /// Whether `cut` is to be delivered.
    is_whole: bool,
}

impl EmptyData {
    /// The first frame begins after `skip` bytes.
    pub fn after(skip: usize) -> Self {
        Self { skip, cut: Vec::new(), is_whole: false }
    }

    /// Reads by `read`, and hides what is to be hidden. A head is delivered once it is complete, or when the stream has ended in it.
    pub fn poll_read(
        &mut self,
        buf: &mut ReadBuf<'_>,
        mut read: impl FnMut(&mut ReadBuf<'_>) -> Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.is_whole {
                let some = self.cut.len().min(buf.remaining());
                buf.put_slice(&self.cut[..some]);
                self.cut.drain(..some);
                self.is_whole = !self.cut.is_empty();
                return Poll::Ready(Ok(()));
            }
            if self.cut.is_empty() {
                let before = buf.filled().len();
                ready!(read(buf))?;
                if buf.filled().len() == before {
                    return Poll::Ready(Ok(()));
                }
                let left = self.hide(&mut buf.filled_mut()[before..]);
                let whole = buf.filled().len() - left;
                self.cut.extend_from_slice(&buf.filled()[whole..]);
                buf.set_filled(whole);
                if whole > before {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let mut rest = [0; HEAD];
                let mut rest = ReadBuf::new(&mut rest[self.cut.len()..]);
                ready!(read(&mut rest))?;
                self.cut.extend_from_slice(rest.filled());
                self.is_whole = rest.filled().is_empty() || self.cut.len() == HEAD;
                if self.cut.len() == HEAD {
                    let mut head = std::mem::take(&mut self.cut);
                    self.hide(&mut head);
                    self.cut = head;
                }
            }
        }
    }

    /// Changes the frames in `bytes`. Returns the number of bytes at their end that begin a head.
    fn hide(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        loop {
            let skipped = self.skip.min(bytes.len() - at);
            self.skip -= skipped;
            at += skipped;
            let Some(head) = bytes.get_mut(at..at + HEAD) else { return bytes.len() - at };
            self.skip = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            if self.skip == 0 && head[3] == kind::DATA && head[4] & (END_STREAM | PADDED) == 0 {
                head[3] = IGNORED;
            }
            at += HEAD;
        }
    }
}

/// A connection that is read without such frames.
pub struct WithoutEmptyData<S> {
    inner: S,
    place: EmptyData,
}

impl<S> WithoutEmptyData<S> {
    /// The first frame begins at the next byte.
    pub fn new(inner: S) -> Self {
        Self { inner, place: EmptyData::after(0) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithoutEmptyData<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { inner, place } = self.get_mut();
        place.poll_read(buf, |buf| Pin::new(&mut *inner).poll_read(cx, buf))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithoutEmptyData<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize, kind: u8, flags: u8, stream: u8) -> Vec<u8> {
        let mut bytes = (length as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, stream]);
        // Payloads that look like empty DATA frames.
        bytes.extend(std::iter::repeat_n(0, length));
        bytes
    }

    /// Reads `wire` in pieces of `pieces` into buffers of `room`, with a pause before each piece.
    fn read(wire: &[u8], skip: usize, pieces: usize, room: usize) -> Vec<u8> {
        let (mut place, mut read) = (EmptyData::after(skip), Vec::new());
        let (mut chunks, mut chunk, mut is_paused) = (wire.chunks(pieces), &[][..], false);
        loop {
            let mut space = vec![0xaa; room + 2];
            let mut buf = ReadBuf::new(&mut space);
            buf.put_slice(&[1, 2]);
            let polled = place.poll_read(&mut buf, |buf| {
                if chunk.is_empty() {
                    is_paused = !is_paused;
                    if is_paused {
                        return Poll::Pending;
                    }
                    chunk = chunks.next().unwrap_or_default();
                }
                let some = chunk.len().min(buf.remaining());
                buf.put_slice(&chunk[..some]);
                chunk = &chunk[some..];
                Poll::Ready(Ok(()))
            });
            let (before, new) = buf.filled().split_at(2);
            assert_eq!(before, [1, 2]);
            match polled {
                Poll::Pending => assert!(new.is_empty()),
                Poll::Ready(Ok(())) if new.is_empty() => return read,
                Poll::Ready(result) => {
                    result.expect("a read");
                    read.extend_from_slice(new);
                }
            }
        }
    }

    #[test]
    fn empty_data_frames_are_hidden_wherever_reads_end() {
        let empty = frame(0, kind::DATA, 0, 1);
        let mut hidden = empty.clone();
        hidden[3] = IGNORED;
        let others = [
            frame(30, kind::DATA, 0, 1),
            frame(0, kind::DATA, END_STREAM, 3),
            frame(4, kind::DATA, PADDED, 5),
            frame(0, 4, 0, 0),
            frame(70_000, kind::HEADERS, 4, 5),
            frame(1, kind::DATA, 0, 1),
        ];
        let preface = vec![0; 24];
        let (mut wire, mut expected) = (preface.clone(), preface);
        for other in &others {
            wire.extend([&empty[..], other, &empty, &empty].concat());
            expected.extend([&hidden[..], other, &hidden, &hidden].concat());
        }
        // The stream ends within a head.
        wire.extend(&empty[..7]);
        expected.extend(&empty[..7]);
        for pieces in [1, 2, 4, 8, 9, 10, 33, 4096, wire.len()] {
            for room in [1, 3, 8, 9, 100, 8192] {
                assert!(read(&wire, 24, pieces, room) == expected, "pieces of {pieces}, room for {room}");
            }
        }
    }
}
