//! The byte stream below h2, which records the frame heads that pass in both directions.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::{
    client::Traffic,
    http::{
        empty_data::EmptyData,
        frame_heads::{FrameHeads, PREFACE},
    },
};

pub(super) struct CountedIo {
    traffic: Rc<Traffic>,
    /// Bytes read before, which h2 has not taken yet.
    read: BytesMut,
    incoming: FrameHeads,
    empty: EmptyData,
    outgoing: FrameHeads,
}

impl CountedIo {
    /// `read` holds bytes already read from the connection.
    pub(super) fn new(traffic: Rc<Traffic>, read: BytesMut) -> Self {
        let (incoming, empty, outgoing) = (FrameHeads::after(PREFACE), EmptyData::after(PREFACE), FrameHeads::after(0));
        Self { traffic, read, incoming, empty, outgoing }
    }

    fn written(&mut self, bytes: &[u8], now: Instant) {
        let traffic = &self.traffic;
        self.outgoing.feed(bytes, |frame| traffic.sent(frame, now));
    }
}

impl AsyncRead for CountedIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { traffic, read, incoming, empty, .. } = self.get_mut();
        traffic.asked();
        empty.poll_read(buf, |buf| {
            if traffic.over().is_some() {
                // Stops reading from a client over its budget; the connection task has been woken to end the connection.
                return Poll::Pending;
            }
            if traffic.turn_is_over() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let before = buf.filled().len();
            if read.is_empty() {
                let read = Pin::new(&mut *traffic.wire().borrow_mut()).poll_read(cx, buf);
                if read.is_pending() {
                    traffic.all_read();
                }
                ready!(read)?;
            } else {
                let some = read.len().min(buf.remaining());
                buf.put_slice(&read[..some]);
                read.advance(some);
            }
            let now = Instant::now();
            incoming.feed(&buf.filled()[before..], |frame| {
                traffic.received(frame, now);
            });
            traffic.note_unfinished(incoming.unfinished(), now);
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for CountedIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let n = ready!(Pin::new(&mut *this.traffic.wire().borrow_mut()).poll_write(cx, buf))?;
        this.written(&buf[..n], Instant::now());
        Poll::Ready(Ok(n))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let n = ready!(Pin::new(&mut *this.traffic.wire().borrow_mut()).poll_write_vectored(cx, bufs))?;
        let (mut left, now) = (n, Instant::now());
        for buf in bufs {
            let some = left.min(buf.len());
            this.written(&buf[..some], now);
            left -= some;
        }
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        self.traffic.wire().borrow().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.traffic.wire().borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.traffic.wire().borrow_mut()).poll_shutdown(cx)
    }
}
