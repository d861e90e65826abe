//! The socket that h2 uses for an HTTP/2 connection to an endpoint. The number of acknowledged bytes can be read while h2
//! owns the socket and after it was closed.

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{crossing, written::WrittenRequests};
use crate::{
    http::{
        empty_data::EmptyData,
        frame_heads::{FrameHeads, LargeBlocks},
    },
    kernel::socket,
};

/// h2's side. Dropping it closes the connection, or leaves that to its link if the endpoint may still acknowledge bytes.
pub(super) struct EndpointIo(Rc<Link>);

/// The agent's view of the socket.
pub(super) struct Link {
    stream: RefCell<Option<TcpStream>>,
    /// Acknowledged bytes when the socket was closed.
    last: Cell<Option<u64>>,
    /// What was received.
    frames: RefCell<FrameHeads>,
    empty: RefCell<EmptyData>,
    large: RefCell<LargeBlocks>,
    written: RefCell<WrittenRequests>,
}

impl EndpointIo {
    /// `block` is the most bytes of received trailers in frames.
    pub(super) fn new(stream: TcpStream, block: usize) -> (Self, Rc<Link>) {
        let link = Rc::new(Link {
            stream: RefCell::new(Some(stream)),
            last: Cell::new(None),
            frames: RefCell::new(FrameHeads::after(0)),
            empty: RefCell::new(EmptyData::after(0)),
            large: RefCell::new(LargeBlocks::new(block)),
            written: RefCell::new(WrittenRequests::new()),
        });
        (Self(Rc::clone(&link)), link)
    }

    fn with<T>(&self, f: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match &mut *self.0.stream.borrow_mut() {
            Some(stream) => f(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn noting_block<T>(&self, write: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let done = self.with(write);
        if done.is_pending() {
            self.0.written.borrow_mut().was_blocked();
        }
        done
    }
}

impl Link {
    /// Bytes that the endpoint's kernel has acknowledged. Returns `None` if that is unknown.
    pub(super) fn acknowledged(&self) -> Option<u64> {
        match &*self.stream.borrow() {
            Some(stream) => socket::acknowledged(stream).ok(),
            None => self.last.get(),
        }
    }
}

impl Link {
    /// Whether fields may be missing from the head or the trailers of this stream.
    pub(super) fn lacks_fields(&self, stream: u32) -> bool {
        self.large.borrow().contains(stream)
    }

    /// What has been written of the requests. The caller must release the borrow before h2 runs.
    pub(super) fn written(&self) -> &RefCell<WrittenRequests> {
        &self.written
    }

    /// As [`EndpointConnection::acknowledged_more`](super::connection::EndpointConnection::acknowledged_more).
    pub(super) async fn acknowledged_more(&self, before: u64) -> Option<bool> {
        if let Some(last) = self.last.get() {
            return Some(last > before);
        }
        crossing::decided(|| crossing::look(self.stream.borrow().as_ref()?, before)).await
    }
}

impl Drop for EndpointIo {
    fn drop(&mut self) {
        if self.0.stream.borrow().as_ref().is_some_and(crossing::may_follow) {
            return;
        }
        self.0.last.set(self.0.acknowledged());
        self.0.stream.take();
    }
}

impl AsyncRead for EndpointIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.empty.borrow_mut().poll_read(buf, |buf| {
            let before = buf.filled().len();
            let read = self.with(|stream| stream.poll_read(cx, buf));
            let mut large = self.0.large.borrow_mut();
            self.0.frames.borrow_mut().feed(&buf.filled()[before..], |frame| large.note(frame));
            read
        })
    }
}

impl AsyncWrite for EndpointIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = ready!(self.noting_block(|stream| stream.poll_write(cx, buf)))?;
        self.0.written.borrow_mut().wrote(&buf[..n]);
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(self.noting_block(|stream| stream.poll_write_vectored(cx, bufs)))?;
        let (mut left, mut written) = (n, self.0.written.borrow_mut());
        for buf in bufs {
            let some = left.min(buf.len());
            written.wrote(&buf[..some]);
            left -= some;
        }
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    /// Sends no FIN while it is undecided whether the endpoint received bytes that crossed with its own; closing follows.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| if crossing::may_follow(&stream) { Poll::Ready(Ok(())) } else { stream.poll_shutdown(cx) })
    }
}
