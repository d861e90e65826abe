//! Bodies of HTTP/2 messages that are written piece by piece, through a queue of one piece, so that the writer waits
//! for the peer.
//!
//! If the writer is dropped before [`FrameSender::end`], the body yields an error and hyper resets the stream with the
//! body's reason. So a truncated body never ends cleanly.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

/// The body was not finished. hyper takes the reset reason from the source.
#[derive(Debug, thiserror::Error)]
#[error("the body was truncated")]
pub struct Cut(#[source] h2::Error);

/// The reason with which the stream of a truncated body is reset.
#[derive(Debug, Clone)]
pub struct CutReason(Rc<Cell<Reason>>);

impl CutReason {
    /// The peer has answered and does not need the rest (RFC 9113 §8.1).
    pub fn set_answered(&self) {
        self.0.set(Reason::NO_ERROR);
    }
}

/// The peer does not want the rest of the body.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the peer closed the stream")]
pub struct Gone;

enum Piece {
    Frame(Frame<Bytes>),
    End,
}

pub struct FrameBody(Source);

enum Source {
    /// The whole body, until it has been returned.
    Whole(Option<Bytes>),
    Written {
        pieces: mpsc::Receiver<Piece>,
        length: Option<u64>,
        ended: bool,
        cut: CutReason,
    },
}

pub struct FrameSender {
    pieces: mpsc::Sender<Piece>,
    cut: CutReason,
}

impl FrameBody {
    pub fn whole(body: Bytes) -> Self {
        Self(Source::Whole(Some(body).filter(|body| !body.is_empty())))
    }

    /// The body of a response that the sender writes; `length` in bytes, if known.
    pub fn written(length: Option<u64>) -> (FrameSender, Self) {
        Self::of(length, Reason::INTERNAL_ERROR)
    }

    /// The body of a request of `length` bytes.
    pub fn request(length: u64) -> (FrameSender, Self) {
        Self::of(Some(length), Reason::CANCEL)
    }

    fn of(length: Option<u64>, cut: Reason) -> (FrameSender, Self) {
        let (sender, pieces) = mpsc::channel(1);
        let cut = CutReason(Rc::new(Cell::new(cut)));
        let body = Self(Source::Written { pieces, length, ended: false, cut: cut.clone() });
        (FrameSender { pieces: sender, cut }, body)
    }
}

impl FrameSender {
    /// Sends a piece of the body; waits until the queue has room. Not cancel-safe: the piece may be lost.
    pub async fn data(&self, piece: Bytes) -> Result<(), Gone> {
        self.send(Piece::Frame(Frame::data(piece))).await
    }

    /// Ends the body, with trailers unless they are empty.
    pub async fn end(self, trailers: HeaderMap) -> Result<(), Gone> {
        // After trailers the body is not polled again.
        let last = if trailers.is_empty() { Piece::End } else { Piece::Frame(Frame::trailers(trailers)) };
        self.send(last).await
    }

    /// Resolves when the body is no longer read. Cancel-safe.
    pub async fn gone(&self) {
        self.pieces.closed().await;
    }

    pub fn cut(&self) -> CutReason {
        self.cut.clone()
    }

    async fn send(&self, piece: Piece) -> Result<(), Gone> {
        self.pieces.send(piece).await.map_err(|_| Gone)
    }
}

impl Body for FrameBody {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match &mut self.0 {
            Source::Whole(body) => Poll::Ready(body.take().map(|body| Ok(Frame::data(body)))),
            Source::Written { ended: true, .. } => Poll::Ready(None),
            Source::Written { pieces, ended, cut, .. } => Poll::Ready(match ready!(pieces.poll_recv(cx)) {
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
                    Some(Err(Cut(cut.0.get().into())))
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
