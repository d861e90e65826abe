//! One request's stream to its EPP.
//!
//! It has no task and no deadline of its own. Sending never waits for the EPP's headers, which may come only with its first message.
//! After the outcome no failure of the stream is an error. Dropping a stream cancels it; `finish` ends it.

mod response;

use std::{
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::future::{BoxFuture, FutureExt as _, poll_fn};
use tokio::{sync::oneshot, time::timeout};
use tokio_util::task::TaskTracker;

pub use self::response::{Heard, ResponseReply};
use super::ReplicaLink;
use crate::{
    picker::{
        connection::{Loss, ReplicaConnections, ReplicaStream},
        error::PickError,
        exchange::{Event, Exchange, Outcome},
        grpc::{self, GrpcStream, PeerEnd},
        metadata,
        replica::Replica,
        silence::Waiting,
    },
    tee::Rest,
};

/// Messages that are encoded together, in bytes. The others wait in the exchange until the EPP takes them.
const TOGETHER: usize = 64 << 10;
/// How long an EPP has to read the remaining messages after the response has ended.
const REST: Duration = Duration::from_secs(5);
/// How long a stream is read after that, so that it ends by the EPP's close and not by a reset. Meanwhile the stream counts
/// against the EPP's limit.
const CLOSE: Duration = Duration::from_secs(2);
/// How long the EPP has to close the stream of a request that got no response.
const END: Duration = Duration::from_secs(1);

async fn connecting(connection: ReplicaConnections) -> Result<ReplicaStream, PickError> {
    connection.stream().await.map_err(PickError::not_connected)
}

fn lost(error: &h2::Error, loss: Loss, answered: bool) -> PickError {
    let message = error.to_string();
    match loss {
        Loss::NotTaken => PickError::NotTaken(message),
        Loss::Broken => PickError::Reset { message, answered },
    }
}

/// One request's stream to its EPP.
pub struct PickStream {
    exchange: Exchange,
    channel: Channel,
    /// The URI of the EPP's method.
    method: http::Uri,
    /// Longest message from the EPP in bytes.
    message_limit: usize,
    /// Whether messages may still be sent.
    sends: bool,
    /// Whether sending was tried.
    begun: bool,
    /// Whether the last message ends this side of the stream.
    ends: bool,
    /// Whether the stream was lost, or ended with an error.
    failed: bool,
    /// Whether the request has left for the server.
    sent: bool,
    silence: Waiting,
    replica: Arc<Replica>,
    endings: TaskTracker,
}

/// Where messages go and come from.
enum Channel {
    Connecting(BoxFuture<'static, Result<ReplicaStream, PickError>>),
    /// Declared in this order, so that a stream is reset before it is free for another request.
    Open(Box<GrpcStream>, ReplicaStream),
    Over,
}

impl PickStream {
    /// A stream that connects first. `message_limit` bounds a message from the EPP in bytes.
    pub(super) fn new(
        exchange: Exchange,
        link: &ReplicaLink,
        method: http::Uri,
        message_limit: usize,
        endings: TaskTracker,
    ) -> Self {
        Self {
            exchange,
            channel: Channel::Connecting(connecting(link.connection.clone()).boxed()),
            method,
            message_limit,
            sends: true,
            begun: false,
            ends: false,
            failed: false,
            sent: false,
            silence: Waiting::new(&link.silence),
            replica: Arc::clone(&link.replica),
            endings,
        }
    }

    /// Sends the head now. With a body it leaves with the first piece.
    pub(super) fn send_now(&mut self) {
        // Later calls register their own waker.
        let mut noop = Context::from_waker(Waker::noop());
        let _ = self.poll_send(&mut noop);
    }

    /// The authority of the EPP that is asked, `host:port` as configured.
    pub fn authority(&self) -> &str {
        self.replica.authority.as_str()
    }

    /// Whether the request was sent to the EPP, and not queued for a connection or for the end of another stream.
    pub fn was_sent(&self) -> bool {
        self.sent
    }

    /// Collects the dynamic metadata of the EPP's replies.
    pub fn collect(&mut self, metadata: metadata::SharedMetadata) {
        self.exchange.collect(metadata);
    }

    /// Whether the stream is open and all earlier messages have left, so that a piece of the body may be given. The first piece may
    /// leave with the head.
    pub fn takes_body(&self) -> bool {
        self.sends && !(self.begun && self.exchange.has_message())
    }

    /// Whether messages wait for the EPP to take them.
    pub fn has_unsent(&self) -> bool {
        self.sends && self.exchange.has_message()
    }

    /// Queues a piece of the body, of any size. The next call of a method that waits sends it.
    pub fn give_body(&mut self, piece: Bytes, end: bool) {
        self.exchange.request_body(piece, end);
    }

    /// Sends a piece, and waits until it has left or there is an outcome.
    pub async fn send_body(&mut self, piece: Bytes, end: bool) -> Result<Option<Outcome>, PickError> {
        self.give_body(piece, end);
        if self.has_unsent() { self.progress().await } else { Ok(None) }
    }

    /// Waits for the outcome without a deadline. Cancel-safe.
    pub async fn outcome(&mut self) -> Result<Outcome, PickError> {
        loop {
            if let Some(outcome) = self.progress().await? {
                return Ok(outcome);
            }
        }
    }

    /// Waits for the outcome without a deadline. Returns `None` as soon as messages that were unsent have left. Cancel-safe.
    pub async fn progress(&mut self) -> Result<Option<Outcome>, PickError> {
        let unsent = self.has_unsent();
        poll_fn(|cx| {
            if let Poll::Ready(outcome) = self.poll_outcome(cx) {
                return Poll::Ready(outcome.and_then(|outcome| outcome.ok_or(PickError::ClosedWithoutPick)).map(Some));
            }
            let sent = self.poll_send(cx);
            if unsent { sent.map(|()| Ok(None)) } else { Poll::Pending }
        })
        .await
    }

    /// The outcome at the deadline: a pick if the EPP has sent enough for one, otherwise an error.
    pub fn at_deadline(&mut self) -> Result<Outcome, PickError> {
        self.exchange.deadline();
        while let Some(event) = self.exchange.next_event() {
            if let Event::Outcome(outcome) = event? {
                return Ok(outcome);
            }
        }
        Err(PickError::Deadline)
    }

    /// Ends the stream of a request that got no response, and waits for at most `END` until the EPP has closed it: by then the EPP
    /// does not count the request any more. Cancel-safe: a stream that is dropped is cancelled.
    pub async fn end(mut self) {
        let ended = async {
            poll_fn(|cx| if self.poll_replies(cx).is_ready() { Poll::Ready(()) } else { self.poll_send(cx) }).await;
            self.end_sending();
            poll_fn(|cx| self.poll_replies(cx)).await;
        };
        // Otherwise the stream is cancelled.
        let _ = timeout(END, ended).await;
    }

    /// Ends the stream after the response: sends the `rest` of its body and the end. Closes the sending side,
    /// and waits in the background for the EPP to close the other, for at most `REST` and `CLOSE`.
    pub fn finish(mut self, rest: Rest) -> StreamEnding {
        let last = rest.pieces.len();
        for (number, piece) in (1..).zip(rest.pieces) {
            self.exchange.response_body(piece, number == last);
        }
        self.exchange.response_end();
        self.ends = true;
        let endings = self.endings.clone();
        let (ending, last) = oneshot::channel();
        endings.spawn(async move {
            // The EPP may stop reading until its replies are read.
            let sent =
                poll_fn(|cx| if self.poll_replies(cx).is_ready() { Poll::Ready(()) } else { self.poll_send(cx) });
            if timeout(REST, sent).await.is_ok() {
                self.end_sending();
                let _ = timeout(CLOSE, poll_fn(|cx| self.poll_replies(cx))).await;
            }
            drop(self);
            drop(last.await);
        });
        StreamEnding(ending)
    }

    /// Reads and discards the EPP's replies until its stream ends.
    fn poll_replies(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(event) = ready!(self.poll_event(cx)) {
            if let Ok(Event::ResponseHead(_)) = event {
                self.silence.late(Instant::now());
            }
        }
        Poll::Ready(())
    }

    /// Returns `None` if the stream has ended and its outcome was already returned.
    fn poll_outcome(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Outcome>, PickError>> {
        loop {
            match ready!(self.poll_event(cx)) {
                Some(Ok(Event::Outcome(outcome))) => return Poll::Ready(Ok(Some(outcome))),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(None)),
            }
        }
    }

    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, PickError>>> {
        loop {
            if let Some(event) = self.exchange.next_event() {
                return Poll::Ready(Some(event));
            }
            if matches!(self.channel, Channel::Over) {
                return Poll::Ready(None);
            }
            ready!(self.poll_incoming(cx));
        }
    }

    /// Passes one reply, or the end of the stream, from the EPP to the exchange.
    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.channel {
            Channel::Connecting(_) => return self.poll_connect(cx),
            Channel::Open(grpc, stream) => match ready!(grpc.poll_message(cx)) {
                Ok(reply) => self.exchange.receive(reply),
                Err(PeerEnd::Closed) => self.over(Exchange::closed),
                Err(PeerEnd::Status(status)) => {
                    let (code, message) = (status.code(), status.message().to_owned());
                    self.fail(PickError::Status { code, message });
                }
                Err(PeerEnd::Unclean(how)) => {
                    let (message, answered) = (how.to_owned(), self.exchange.answered());
                    self.fail(PickError::Reset { message, answered });
                }
                Err(PeerEnd::Lost(error)) => {
                    let error = lost(&error, stream.http2.loss(&error), self.exchange.answered());
                    self.fail(error);
                }
            },
            Channel::Over => {}
        }
        Poll::Ready(())
    }

    fn poll_connect(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Channel::Connecting(connecting) = &mut self.channel {
            match ready!(connecting.poll_unpin(cx)) {
                Ok(stream) => self.begin(stream),
                Err(error) => self.fail(error),
            }
        }
        Poll::Ready(())
    }

    /// Opens the stream on its connection.
    pub(super) fn begin(&mut self, stream: ReplicaStream) {
        match GrpcStream::open(&mut stream.http2.sender(), self.method.clone(), self.message_limit) {
            Ok(grpc) => {
                self.sent = !stream.is_queued;
                self.channel = Channel::Open(Box::new(grpc), stream);
            }
            Err(error) => self.fail(lost(&error, stream.http2.loss_at_open(&error), false)),
        }
    }

    fn fail(&mut self, error: PickError) {
        self.failed = true;
        self.over(|exchange| exchange.failed(error));
    }

    fn over(&mut self, end: impl FnOnce(&mut Exchange)) {
        self.channel = Channel::Over;
        self.sends = false;
        end(&mut self.exchange);
    }

    /// Ready when every message has left or the stream has ended.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.begun = true;
        while self.sends && self.exchange.has_message() {
            match &mut self.channel {
                Channel::Connecting(_) => ready!(self.poll_connect(cx)),
                Channel::Open(grpc, _) => {
                    if !ready!(grpc.poll_ready(cx)) {
                        // `poll_incoming` has the reason.
                        self.sends = false;
                        break;
                    }
                    let mut messages = BytesMut::new();
                    while messages.len() < TOGETHER
                        && let Some(message) = self.exchange.next_message()
                    {
                        grpc::encode(&message, &mut messages);
                    }
                    let end = self.ends && !self.exchange.has_message();
                    grpc.send(messages.freeze(), end);
                    self.sends = !end;
                }
                Channel::Over => break,
            }
        }
        Poll::Ready(())
    }

    /// Ends this side of the stream, if the last message has not.
    fn end_sending(&mut self) {
        self.sends = false;
        if let Channel::Open(grpc, _) = &mut self.channel {
            grpc.send(Bytes::new(), true);
        }
    }
}

/// The end of a stream that was [finished](PickStream::finish).
pub struct StreamEnding(oneshot::Sender<Box<dyn Send>>);

impl StreamEnding {
    /// Drops `last` after the EPP's last reply, or at once if that has come.
    pub fn hold(self, last: impl Send + 'static) {
        drop(self.0.send(Box::new(last)));
    }
}
