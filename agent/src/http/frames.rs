//! Bodies of HTTP/2 messages that are written piece by piece: a queue of one piece, so that whoever writes waits for the peer.
//!
//! A body whose writer is dropped before [`FrameSender::end`] is an error to hyper, which resets the stream: what is cut short
//! never ends cleanly.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

/// The message was not finished.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the body was cut short")]
pub struct Cut;

/// The peer wants no more of it.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the stream is gone")]
pub struct Gone;

enum Piece {
    Frame(Frame<Bytes>),
    End,
}

pub struct FrameBody(Source);

enum Source {
    /// All of it, until it has been given.
    Whole(Option<Bytes>),
    Written {
        pieces: mpsc::Receiver<Piece>,
        length: Option<u64>,
        ended: bool,
    },
}

pub struct FrameSender(mpsc::Sender<Piece>);

impl FrameBody {
    pub fn whole(body: Bytes) -> Self {
        Self(Source::Whole(Some(body).filter(|body| !body.is_empty())))
    }

    /// A body that the sender writes; `length` is its length where it is known.
    pub fn written(length: Option<u64>) -> (FrameSender, Self) {
        let (sender, pieces) = mpsc::channel(1);
        (FrameSender(sender), Self(Source::Written { pieces, length, ended: false }))
    }
}

impl FrameSender {
    /// Waits until there is room. Not cancel-safe: the piece may be lost.
    pub async fn data(&self, piece: Bytes) -> Result<(), Gone> {
        self.send(Piece::Frame(Frame::data(piece))).await
    }

    /// Ends the body, with trailers unless there are none.
    pub async fn end(self, trailers: HeaderMap) -> Result<(), Gone> {
        // Behind trailers nobody asks for more.
        let last = if trailers.is_empty() { Piece::End } else { Piece::Frame(Frame::trailers(trailers)) };
        self.send(last).await
    }

    /// Resolves when nobody reads the body any more. Cancel-safe.
    pub async fn gone(&self) {
        self.0.closed().await;
    }

    async fn send(&self, piece: Piece) -> Result<(), Gone> {
        self.0.send(piece).await.map_err(|_| Gone)
    }
}

impl Body for FrameBody {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match &mut self.0 {
            Source::Whole(body) => Poll::Ready(body.take().map(|body| Ok(Frame::data(body)))),
            Source::Written { ended: true, .. } => Poll::Ready(None),
            Source::Written { pieces, ended, .. } => Poll::Ready(match ready!(pieces.poll_recv(cx)) {
                Some(Piece::Frame(frame)) => {
                    *ended = frame.is_trailers();
                    Some(Ok(frame))
                }
                Some(Piece::End) => {
                    *ended = true;
                    None
                }
                None => {
                    *ended = true;
                    Some(Err(Cut))
                }
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Whole(body) => body.is_none(),
            Source::Written { ended, .. } => *ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Whole(body) => SizeHint::with_exact(body.as_ref().map_or(0, |body| body.len() as u64)),
            Source::Written { length, .. } => length.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}
