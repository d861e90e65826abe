//! Gathers what a connection writes, so that the frames of all streams that were ready together leave in one write.
//!
//! h2 writes and flushes each longer frame by itself. Here writes and flushes only fill a buffer. The connection's task empties it with
//! [`Outgoing::poll_flush`] once h2 has nothing more to do; a full buffer and a shutdown empty it, too.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes in the buffer above which it is emptied before more is taken.
const MOST: usize = 128 << 10;

struct GatheredState<S> {
    io: S,
    buffer: BytesMut,
}

/// The connection as h2 sees it.
pub(super) struct Gathered<S>(Arc<Mutex<GatheredState<S>>>);

/// The buffer as the connection's task sees it.
pub(super) struct Outgoing<S>(Arc<Mutex<GatheredState<S>>>);

pub(super) fn gathered<S>(io: S) -> (Gathered<S>, Outgoing<S>) {
    let state = Arc::new(Mutex::new(GatheredState { io, buffer: BytesMut::new() }));
    (Gathered(Arc::clone(&state)), Outgoing(state))
}

impl<S: AsyncWrite + Unpin> Outgoing<S> {
    /// Writes what was gathered. Must be called by the task that polls the connection.
    pub(super) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().poll_empty(cx)
    }
}

impl<S: AsyncWrite + Unpin> GatheredState<S> {
    fn poll_empty(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.buffer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buffer.advance(written);
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.lock();
        if state.buffer.len() >= MOST {
            ready!(state.poll_empty(cx))?;
        }
        for part in bytes {
            state.buffer.extend_from_slice(part);
        }
        Poll::Ready(Ok(bytes.iter().map(|part| part.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: see the module.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        ready!(state.poll_empty(cx))?;
        Pin::new(&mut state.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn writes_leave_together_when_the_task_flushes() {
        let (near, mut far) = tokio::io::duplex(1024);
        let (mut io, outgoing) = gathered(near);
        io.write_all(b"one ").await.unwrap();
        io.write_all(b"two").await.unwrap();
        io.flush().await.unwrap();
        let mut noop = Context::from_waker(Waker::noop());
        let mut buffer = [0; 64];
        let mut read = ReadBuf::new(&mut buffer);
        assert!(Pin::new(&mut far).poll_read(&mut noop, &mut read).is_pending());
        std::future::poll_fn(|cx| outgoing.poll_flush(cx)).await.unwrap();
        assert_eq!(far.read(&mut buffer).await.unwrap(), 7);
        assert_eq!(&buffer[..7], b"one two");
    }

    #[tokio::test]
    async fn full_buffer_and_shutdown_empty_it() {
        let (near, mut far) = tokio::io::duplex(4 * MOST);
        let (mut io, _outgoing) = gathered(near);
        let sent = vec![7; MOST];
        io.write_all(&sent).await.unwrap();
        io.write_all(b"more").await.unwrap();
        let mut received = vec![0; MOST];
        far.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
        io.shutdown().await.unwrap();
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"more");
    }
}
