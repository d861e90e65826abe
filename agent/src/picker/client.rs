//! Asks an EPP: one `EppClient` per worker and EPP, with connections to each replica in use, and one `PickStream` per request.
//!
//! A stream takes the request's head and body and returns the EPP's outcome; later it sends the response's head and end. It has no
//! task and no deadline of its own. Sending never waits for the EPP's headers, which may come only with its first message. After
//! the outcome no failure of the stream is an error. Dropping a stream cancels it; `finish` ends it.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures_util::future::{BoxFuture, FutureExt, poll_fn};
use parking_lot::Mutex;
use penstock_proto::ext_proc::HeaderMutation;
use tokio::{sync::oneshot, time::timeout};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::{endpoint::set::Snapshot, tee::Rest};

use super::{
    attempts::Attempts,
    connection::{Connection, Loss, Stream},
    error::PickError,
    exchange::{Event, Exchange, ExchangeLimits, ImmediateReply, Outcome},
    grpc::{self, End, GrpcStream},
    keep::{self, Start},
    metadata,
    replica::{Replica, Replicas},
    returned::Answer,
    silence::{HeadReply, Silence, Waiting},
};

/// The method that an EPP serves.
const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Messages that are encoded together, in bytes. The others wait in the exchange until the EPP takes them.
const TOGETHER: usize = 64 << 10;
/// How long an EPP has to read the remaining messages after the response has ended.
const REST: Duration = Duration::from_secs(5);
/// How long a stream is read after that, so that it ends by the EPP's close and not by a reset. Meanwhile the stream counts
/// against the EPP's limit.
const CLOSE: Duration = Duration::from_secs(2);
/// How long the EPP has to close the stream of a request that got no response.
const END: Duration = Duration::from_secs(1);
/// How much longer an EPP's message may be than the body in it.
const MESSAGE: usize = 1 << 20;

/// A worker's client of one EPP.
pub struct EppClient {
    replicas: Arc<Replicas>,
    links: Arc<Links>,
    endings: TaskTracker,
    _keeper: Option<AbortOnDropHandle<()>>,
}

/// A worker's connections to the replicas of an EPP.
pub(super) struct Links {
    pub(super) replicas: Arc<Replicas>,
    known: Mutex<Known>,
}

/// Connections to the replicas that have been asked and still exist.
#[derive(Default)]
struct Known {
    links: Vec<Link>,
    /// The replicas when `links` was last updated.
    replicas: Arc<[Arc<Replica>]>,
}

/// A worker's connections to one replica. Clones share it.
#[derive(Clone)]
struct Link {
    replica: Arc<Replica>,
    connection: Connection,
    silence: Arc<Silence>,
}

impl EppClient {
    /// Creates the client. It connects with the first request.
    pub fn new(replicas: Arc<Replicas>) -> Self {
        let links = Arc::new(Links { replicas: Arc::clone(&replicas), known: Mutex::default() });
        Self { replicas, links, endings: TaskTracker::new(), _keeper: None }
    }

    /// Creates the client, which connects now and whenever its connection is lost. The agent's start waits for the first connection
    /// if `start` is set. Must be called on a tokio runtime.
    pub fn connected(replicas: Arc<Replicas>, start: Option<Start>) -> Self {
        let client = Self::new(replicas);
        let (connected, is_connected) = oneshot::channel();
        if let Some(start) = start {
            tokio::spawn(start.open(is_connected));
        }
        let keeper = AbortOnDropHandle::new(tokio::spawn(keep::keep(Arc::clone(&client.links), connected)));
        Self { _keeper: Some(keeper), ..client }
    }

    /// Resolves when all streams that were [finished](PickStream::finish) have sent their rest or timed out. Call it when nothing
    /// more is asked.
    pub async fn finished(&self) {
        self.endings.close();
        self.endings.wait().await;
    }

    /// Whether this client asks these replicas.
    pub fn asks(&self, replicas: &Arc<Replicas>) -> bool {
        Arc::ptr_eq(&self.replicas, replicas)
    }

    /// The EPP's replicas.
    pub fn replicas(&self) -> &Arc<Replicas> {
        &self.replicas
    }

    /// Selects the replica to ask about a request. See [`Attempts::begin`].
    pub async fn attempts(&self) -> Result<Attempts, PickError> {
        Attempts::begin(&self.replicas).await
    }

    /// The replicas that have stalled.
    pub fn stalled(&self) -> Vec<Arc<Replica>> {
        self.replicas.snapshot().replicas.iter().filter(|replica| replica.is_stalled()).cloned().collect()
    }

    /// Opens a stream about a request without waiting. `subset` is the subset hint. Must be called on a tokio runtime.
    pub fn open(
        &self,
        replica: &Arc<Replica>,
        request: &http::request::Parts,
        has_body: bool,
        subset: Option<&[SocketAddr]>,
        limits: ExchangeLimits,
        members: Option<Arc<Snapshot>>,
    ) -> PickStream {
        let link = self.links.link(replica);
        let header = self.replicas.settings.header.clone();
        let message_limit = limits.replaced_body + MESSAGE;
        let mut exchange = Exchange::new(header, request, has_body, subset, limits);
        if let Some(members) = members {
            exchange = exchange.with_members(members);
        }
        let mut stream = PickStream {
            exchange,
            channel: Channel::Connecting(connecting(link.connection.clone()).boxed()),
            method: link.connection.method(PROCESS),
            message_limit,
            sends: true,
            begun: false,
            ends: false,
            failed: false,
            sent: false,
            silence: Waiting::new(&link.silence),
            replica: link.replica,
            endings: self.endings.clone(),
        };
        if let Some(open) = link.connection.try_stream() {
            stream.begin(open);
        }
        if !has_body {
            // The head leaves now. With a body it leaves with the first piece. Later calls register their own waker.
            let mut noop = Context::from_waker(Waker::noop());
            let _ = stream.poll_send(&mut noop);
        }
        stream
    }
}

impl Links {
    pub(super) fn connection(&self, replica: &Arc<Replica>) -> Connection {
        self.link(replica).connection
    }

    fn link(&self, replica: &Arc<Replica>) -> Link {
        let replicas = self.replicas.snapshot().replicas;
        let mut known = self.known.lock();
        if !Arc::ptr_eq(&known.replicas, &replicas) {
            // Connections to removed replicas close when their streams end.
            known.links.retain(|link| replicas.iter().any(|replica| Arc::ptr_eq(replica, &link.replica)));
            known.replicas = replicas;
        }
        if let Some(link) = known.links.iter().find(|link| Arc::ptr_eq(&link.replica, replica)) {
            return link.clone();
        }
        let connection = Connection::new(&self.replicas, replica);
        let link = Link { replica: Arc::clone(replica), connection, silence: Arc::default() };
        known.links.push(link.clone());
        link
    }
}

async fn connecting(connection: Connection) -> Result<Stream, PickError> {
    connection.stream().await.map_err(PickError::Connect)
}

fn lost(error: &h2::Error, loss: Loss, answered: bool) -> PickError {
    let message = error.to_string();
    match loss {
        Loss::NotTaken => PickError::NotTaken(message),
        Loss::Broken => PickError::Reset { message, answered },
    }
}

/// The EPP's reply to a response's head.
#[derive(Debug, Clone, PartialEq)]
pub enum ResponseReply {
    /// `None` if the stream has ended or the EPP did not reply in time.
    Mutation(Option<HeaderMutation>),
    /// The mutation exceeds the limits and is not applied.
    Excessive,
    Evicted(ImmediateReply),
}

/// What happens on a stream whose answers about a response's body and trailers are obeyed.
#[derive(Debug)]
pub enum Heard {
    /// Every message has left.
    Sent,
    Answer(Answer),
    /// The EPP replied to the trailers. `None` if its mutation exceeds the limits and is not applied.
    Trailers(Option<HeaderMutation>),
    Evicted(ImmediateReply),
    /// The EPP ended the stream with status OK.
    Closed,
    /// The stream was lost, or the EPP ended it with an error.
    Failed,
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
    Connecting(BoxFuture<'static, Result<Stream, PickError>>),
    /// Declared in this order, so that a stream is reset before it is free for another request.
    Open(Box<GrpcStream>, Stream),
    Over,
}

impl PickStream {
    /// The authority of the EPP that is asked, `host:port` as configured.
    pub fn authority(&self) -> &str {
        self.replica.authority.as_str()
    }

    /// Whether the request was sent to the EPP, and not queued for a connection or for the end of another stream.
    pub fn was_sent(&self) -> bool {
        self.sent
    }

    /// Collects the dynamic metadata of the EPP's replies.
    pub fn collect(&mut self, metadata: metadata::Shared) {
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

    /// Sends the head of the response from `served`, and waits at most `wait` for the EPP's mutation. Does not wait if `wait` is
    /// `None` or the EPP is known to be silent about heads. If it is cancelled, the head is still sent and the reply is lost.
    pub async fn response_headers(
        &mut self,
        status: http::StatusCode,
        headers: &http::HeaderMap,
        served: SocketAddr,
        end_of_stream: bool,
        wait: Option<Duration>,
    ) -> ResponseReply {
        self.exchange.response_headers(status, headers, served, end_of_stream);
        let wait = self.silence.ask(wait, Instant::now());
        let reply = poll_fn(|cx| {
            let _ = self.poll_send(cx);
            loop {
                match ready!(self.poll_event(cx)) {
                    Some(Ok(Event::ResponseHead(mutation))) => {
                        self.silence.answered();
                        return Poll::Ready(ResponseReply::Mutation(Some(mutation)));
                    }
                    Some(Ok(Event::Excessive)) => {
                        self.silence.answered();
                        return Poll::Ready(ResponseReply::Excessive);
                    }
                    Some(Ok(Event::Outcome(Outcome::Immediate(reply)))) => {
                        return Poll::Ready(ResponseReply::Evicted(reply));
                    }
                    Some(_) => {}
                    None => return Poll::Ready(ResponseReply::Mutation(None)),
                }
            }
        });
        let reply = match wait {
            Some(wait) => match timeout(wait, reply).await {
                Ok(reply) => Some(reply),
                Err(_) => {
                    self.silence.timed_out();
                    None
                }
            },
            None => reply.now_or_never(),
        };
        reply.unwrap_or(ResponseReply::Mutation(None))
    }

    /// How the EPP replied to the response's head. Returns `None` if no head was sent.
    pub fn head_reply(&self) -> Option<HeadReply> {
        self.silence.reply()
    }

    /// Resolves when the EPP evicts the request, and never otherwise. Cancel-safe.
    pub async fn evicted(&mut self) -> ImmediateReply {
        self.evicted_while_sending(|| None).await
    }

    /// As [`evicted`](Self::evicted), but also sends pieces of the response's body, one at a time as the EPP takes them. `more` is
    /// called whenever the future is polled, so pieces have to be produced earlier in the same task.
    pub async fn evicted_while_sending(&mut self, mut more: impl FnMut() -> Option<Bytes>) -> ImmediateReply {
        poll_fn(|cx| {
            while self.poll_send(cx).is_ready()
                && let Some(piece) = more()
            {
                // If the stream has ended, the piece is dropped.
                if self.sends {
                    self.exchange.response_body(piece, false);
                }
            }
            loop {
                match ready!(self.poll_event(cx)) {
                    Some(Ok(Event::Outcome(Outcome::Immediate(reply)))) => return Poll::Ready(reply),
                    Some(Ok(Event::ResponseHead(_))) => self.silence.late(Instant::now()),
                    Some(_) => {}
                    None => return Poll::Pending,
                }
            }
        })
        .await
    }

    /// Whether the EPP has ended the stream with status OK.
    pub fn is_closed(&self) -> bool {
        matches!(self.channel, Channel::Over) && !self.failed
    }

    /// Whether the stream was lost, or the EPP ended it with an error.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// From now on [`heard`](Self::heard) returns the EPP's answers about the response's body and trailers.
    pub fn obey(&mut self) {
        self.exchange.obey();
    }

    /// Queues a message with a piece of the response's body, which must not be longer than a message.
    pub fn give_response(&mut self, piece: Bytes, end: bool) {
        if self.sends {
            self.exchange.response_body(piece, end);
        }
    }

    /// Queues the trailers, which end the response.
    pub fn give_trailers(&mut self, trailers: &http::HeaderMap) {
        if self.sends {
            self.exchange.response_trailers(trailers);
        }
    }

    /// Whether the EPP has replaced the response's body with its reply to the head. [`heard`](Self::heard) returns it.
    pub fn replaces_body(&self) -> bool {
        self.exchange.replaces_body()
    }

    /// Sends what is queued, and returns what the EPP says about the response. Returns `Sent` once, when everything that was
    /// queued has left. Cancel-safe.
    pub async fn heard(&mut self) -> Heard {
        let unsent = self.has_unsent();
        poll_fn(|cx| {
            while let Poll::Ready(event) = self.poll_event(cx) {
                match event {
                    Some(Ok(Event::ResponseBody(answer))) => return Poll::Ready(Heard::Answer(answer)),
                    Some(Ok(Event::ResponseTrailers(change))) => return Poll::Ready(Heard::Trailers(change)),
                    Some(Ok(Event::Outcome(Outcome::Immediate(reply)))) => return Poll::Ready(Heard::Evicted(reply)),
                    Some(Ok(Event::ResponseHead(_))) => self.silence.late(Instant::now()),
                    Some(_) => {}
                    None if self.failed => return Poll::Ready(Heard::Failed),
                    None => return Poll::Ready(Heard::Closed),
                }
            }
            let sent = self.poll_send(cx);
            if unsent { sent.map(|()| Heard::Sent) } else { Poll::Pending }
        })
        .await
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
    pub fn finish(mut self, rest: Rest) -> Ending {
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
        Ending(ending)
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

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Event, PickError>>> {
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
                Err(End::Closed) => self.over(Exchange::closed),
                Err(End::Status(status)) => {
                    let (code, message) = (status.code(), status.message().to_owned());
                    self.fail(PickError::Status { code, message });
                }
                Err(End::Lost(error)) => {
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
    fn begin(&mut self, stream: Stream) {
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
pub struct Ending(oneshot::Sender<Box<dyn Send>>);

impl Ending {
    /// Drops `last` after the EPP's last reply, or at once if that has come.
    pub fn hold(self, last: impl Send + 'static) {
        drop(self.0.send(Box::new(last)));
    }
}

#[cfg(test)]
mod tests;
