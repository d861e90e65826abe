//! A client's HTTP/2 stream: one request, whose body comes in frames, and one answer.
//!
//! hyper owns the connection and the stream's place in it. Dropping this before the answer is complete resets the stream.

use std::io;

use bytes::Bytes;
use http::{HeaderMap, Response, request};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Frame, Incoming};
use tokio::sync::oneshot;

use crate::http::frames::{FrameBody, FrameSender};

/// Where hyper gets the answer from.
pub(crate) type Answer = oneshot::Receiver<Response<FrameBody>>;

pub struct ClientStream {
    body: Incoming,
    state: State,
    tls: bool,
}

enum State {
    Unanswered(oneshot::Sender<Response<FrameBody>>),
    Flowing(FrameSender),
    /// The head was all, and [`ClientStream::end`] is still to come.
    Ended,
    Answered,
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl ClientStream {
    /// `tls`: the connection is.
    pub(crate) fn new(request: http::Request<Incoming>, tls: bool) -> (request::Parts, Self, Answer) {
        let (parts, body) = request.into_parts();
        let (head, answer) = oneshot::channel();
        (parts, Self { body, state: State::Unanswered(head), tls }, answer)
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The answer has been given, or its head.
    pub fn is_answered(&self) -> bool {
        !matches!(self.state, State::Unanswered(_))
    }

    /// The next frame of the request's body. Cancel-safe.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        self.body.frame().await
    }

    /// The request's body has been read to its end.
    pub fn is_read(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Resolves when the client has left. Cancel-safe.
    pub async fn gone(&mut self) {
        match &mut self.state {
            State::Unanswered(head) => head.closed().await,
            State::Flowing(body) => body.gone().await,
            State::Ended | State::Answered => std::future::pending().await,
        }
    }

    /// Gives the whole answer.
    pub fn reply(&mut self, head: Response<()>, body: Bytes) -> io::Result<()> {
        let State::Unanswered(to) = std::mem::replace(&mut self.state, State::Answered) else { return Err(gone()) };
        to.send(head.map(|()| FrameBody::whole(body))).map_err(|_| gone())
    }

    /// Gives the head of an answer whose body follows; `length` where it is known.
    pub fn begin(&mut self, head: Response<()>, length: Option<u64>) -> io::Result<()> {
        let (sender, body) = FrameBody::written(length);
        match std::mem::replace(&mut self.state, State::Flowing(sender)) {
            State::Unanswered(to) => to.send(head.map(|()| body)).map_err(|_| gone()),
            _ => Err(gone()),
        }
    }

    /// Gives the head of an answer without a body; it is to be ended all the same.
    pub fn begin_and_end(&mut self, head: Response<()>) -> io::Result<()> {
        self.reply(head, Bytes::new())?;
        self.state = State::Ended;
        Ok(())
    }

    /// Waits until the client takes it. Not cancel-safe: afterwards the stream can only be broken off.
    pub async fn data(&mut self, piece: Bytes) -> io::Result<()> {
        match &self.state {
            State::Flowing(body) => body.data(piece).await.map_err(|_| gone()),
            _ => Err(gone()),
        }
    }

    pub async fn end(&mut self, trailers: HeaderMap) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::Answered) {
            State::Flowing(body) => body.end(trailers).await.map_err(|_| gone()),
            State::Ended => Ok(()),
            _ => Err(gone()),
        }
    }
}
