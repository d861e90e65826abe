//! Asking an EPP: `EppClient` per worker and EPP, with a connection to each replica in use; `PickStream` per request.
//!
//! Given a replica, a request's head and pieces of its body, a stream gives the EPP's outcome, and later carries the head and the end of
//! the response. It drives the exchange over the shared connection, without tasks of its own and without a deadline: whoever
//! waits decides for how long. The EPP may send its headers only with its first message, so sending never waits for them.
//! After the outcome nothing that happens to the stream is an error. Dropping a stream cancels it; `finish` ends it.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt, poll_fn},
};
use parking_lot::Mutex;
use penstock_proto::ext_proc::{
    HeaderMutation, ProcessingRequest, ProcessingResponse, external_processor_client::ExternalProcessorClient,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::PollSender, task::TaskTracker};
use tonic::{CancellationHandle, Streaming};

use crate::endpoint::set::Snapshot;

use super::{
    attempts::Attempts,
    connection::{Connection, Http2, Loss},
    error::PickError,
    exchange::{Event, Exchange, ImmediateReply, Limits, Outcome},
    replica::{Replica, Replicas},
    silence::{Reply, Silence, Waiting},
};

/// Messages between the agent and the connection, beyond which they wait in the exchange for the EPP to take them.
const QUEUE: usize = 2;
/// How long an EPP may take to take what is left to tell it of a response that is over.
const REST: Duration = Duration::from_secs(5);
/// How long a stream is read after that, so that it ends by the EPP's close and not by a reset. Streams count against the
/// EPP's limit meanwhile.
const CLOSE: Duration = Duration::from_secs(2);
/// A message of the EPP may be this much longer than the body in it.
const MESSAGE: usize = 1 << 20;

/// The way to one EPP.
pub struct EppClient {
    replicas: Arc<Replicas>,
    lines: Mutex<Lines>,
    endings: TaskTracker,
}

/// To the replicas that have been asked and are still there.
#[derive(Default)]
struct Lines {
    lines: Vec<Line>,
    /// When they were last held against these.
    known: Arc<[Arc<Replica>]>,
}

/// What a worker has with one replica. Clones share it.
#[derive(Clone)]
struct Line {
    replica: Arc<Replica>,
    connection: Connection,
    silence: Arc<Silence>,
}

impl EppClient {
    /// Connects with the first request.
    pub fn new(replicas: Arc<Replicas>) -> Self {
        Self { replicas, lines: Mutex::default(), endings: TaskTracker::new() }
    }

    /// Resolves when the EPPs have been told the rest of the streams that are [finished](PickStream::finish), or have had their
    /// time. For when nothing more is asked.
    pub async fn finished(&self) {
        self.endings.close();
        self.endings.wait().await;
    }

    /// Whether these are the replicas that it asks.
    pub fn asks(&self, replicas: &Arc<Replicas>) -> bool {
        Arc::ptr_eq(&self.replicas, replicas)
    }

    /// Whom to ask about a request. See [`Attempts::begin`].
    pub async fn attempts(&self) -> Result<Attempts, PickError> {
        Attempts::begin(&self.replicas).await
    }

    /// The replicas that have stalled.
    pub fn stalled(&self) -> Vec<Arc<Replica>> {
        self.replicas.snapshot().replicas.iter().filter(|replica| replica.is_stalled()).cloned().collect()
    }

    /// Starts asking about a request. Does not wait, and must be called on a tokio runtime. `subset`: choose among these.
    pub fn open(
        &self,
        replica: &Arc<Replica>,
        request: &http::request::Parts,
        has_body: bool,
        subset: Option<&[SocketAddr]>,
        limits: Limits,
        members: Option<Arc<Snapshot>>,
    ) -> PickStream {
        let line = self.line(replica);
        let (out, messages) = mpsc::channel(QUEUE);
        let mut request_stream = tonic::Request::new(ReceiverStream::new(messages));
        let cancel = CancelOnDrop(Some(request_stream.cancellation_handle()));
        let call = call(line.connection, request_stream, limits.replaced_body + MESSAGE);
        let header = self.replicas.settings.header.clone();
        let mut exchange = Exchange::new(header, request, has_body, subset, limits);
        if let Some(members) = members {
            exchange = exchange.among(members);
        }
        let mut stream = PickStream {
            _cancel: cancel,
            exchange,
            out: Some(PollSender::new(out)),
            answer: Answer::Awaited(call.boxed()),
            silence: Waiting::new(&line.silence),
            replica: line.replica,
            endings: self.endings.clone(),
        };
        // The head leaves now, not when the first piece of the body is there; whoever waits later registers its own waker.
        let mut nobody = Context::from_waker(Waker::noop());
        let _ = stream.poll_send(&mut nobody);
        let _ = stream.poll_answer(&mut nobody);
        stream
    }

    fn line(&self, replica: &Arc<Replica>) -> Line {
        let known = self.replicas.snapshot().replicas;
        let mut all = self.lines.lock();
        if !Arc::ptr_eq(&all.known, &known) {
            // Connections to replicas that are gone close when their streams are over.
            all.lines.retain(|line| known.iter().any(|replica| Arc::ptr_eq(replica, &line.replica)));
            all.known = known;
        }
        if let Some(line) = all.lines.iter().find(|line| Arc::ptr_eq(&line.replica, replica)) {
            return line.clone();
        }
        let connection = Connection::new(&self.replicas, replica);
        let line = Line { replica: Arc::clone(replica), connection, silence: Arc::default() };
        all.lines.push(line.clone());
        line
    }
}

async fn call(
    connection: Connection,
    request: tonic::Request<ReceiverStream<ProcessingRequest>>,
    message_limit: usize,
) -> Result<(Streaming<ProcessingResponse>, Http2), PickError> {
    let http2 = connection.get().await.map_err(PickError::Connect)?;
    let client = ExternalProcessorClient::with_origin(http2.clone(), connection.origin());
    let mut client = client.max_decoding_message_size(message_limit);
    match client.process(request).await {
        Ok(response) => Ok((response.into_inner(), http2)),
        Err(status) => Err(failure(&status, &http2, false)),
    }
}

fn failure(status: &tonic::Status, http2: &Http2, answered: bool) -> PickError {
    let message = status.message().to_owned();
    match http2.loss(status) {
        Some(Loss::NotTaken) => PickError::NotTaken(message),
        Some(Loss::Broken) => PickError::Reset { message, answered },
        None => PickError::Status { code: status.code(), message },
    }
}

/// What the EPP says about a response's head.
#[derive(Debug, Clone, PartialEq)]
pub enum ResponseReply {
    /// None: the stream is over, or the EPP took too long.
    Mutation(Option<HeaderMutation>),
    /// A mutation over the limits, which is not applied.
    Excessive,
    Evicted(ImmediateReply),
}

/// One request's stream to its EPP.
pub struct PickStream {
    /// First, so that the stream is cancelled before the end of `out` could look like an orderly close.
    _cancel: CancelOnDrop,
    exchange: Exchange,
    out: Option<PollSender<ProcessingRequest>>,
    answer: Answer,
    silence: Waiting,
    replica: Arc<Replica>,
    endings: TaskTracker,
}

enum Answer {
    Awaited(BoxFuture<'static, Result<(Streaming<ProcessingResponse>, Http2), PickError>>),
    Open(Box<Streaming<ProcessingResponse>>, Http2),
    Over,
}

impl PickStream {
    /// The EPP that is asked, `host:port` as configured.
    pub fn authority(&self) -> &str {
        self.replica.authority.as_str()
    }

    /// Whether the stream is open for a piece of the body, and has nothing left of those before.
    pub fn takes_body(&self) -> bool {
        self.out.is_some() && !self.exchange.has_message()
    }

    /// Whether there is something that the EPP has not taken yet.
    pub fn has_unsent(&self) -> bool {
        self.out.is_some() && self.exchange.has_message()
    }

    /// Hands over a piece of the body, of any size. It leaves with the next call of any method that waits.
    pub fn give_body(&mut self, piece: Bytes, end: bool) {
        self.exchange.request_body(piece, end);
    }

    /// Gives a piece, and waits until it has left or there is an outcome.
    pub async fn send_body(&mut self, piece: Bytes, end: bool) -> Result<Option<Outcome>, PickError> {
        self.give_body(piece, end);
        if self.has_unsent() { self.progress().await } else { Ok(None) }
    }

    /// Waits for the outcome, however long it takes. Cancel-safe.
    pub async fn outcome(&mut self) -> Result<Outcome, PickError> {
        loop {
            if let Some(outcome) = self.progress().await? {
                return Ok(outcome);
            }
        }
    }

    /// Waits for the outcome, however long it takes; `None` once what was unsent has left, if anything was. Cancel-safe.
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

    /// The outcome as far as it is known when the time is up.
    pub fn at_deadline(&mut self) -> Result<Outcome, PickError> {
        self.exchange.deadline();
        while let Some(event) = self.exchange.next_event() {
            if let Event::Outcome(outcome) = event? {
                return Ok(outcome);
            }
        }
        Err(PickError::Deadline)
    }

    /// Tells the EPP about the head of the response that `served` gave, and waits at most `wait` for its mutation of it; with
    /// none, and while the EPP is known to be silent about heads, it does not wait. Cancel-safe: the head has been taken, the
    /// reply is lost.
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

    /// What became of the question about the response's head; `None`: there was none.
    pub fn head_reply(&self) -> Option<Reply> {
        self.silence.reply()
    }

    /// Resolves when the EPP evicts the request, and never otherwise: the response does not depend on the EPP. Cancel-safe.
    pub async fn evicted(&mut self) -> ImmediateReply {
        self.evicted_telling(|| None).await
    }

    /// As [`evicted`](Self::evicted), and tells the EPP about pieces of the response's body, one at a time as it takes them.
    /// `more` is asked whenever the future is polled, so whoever produces pieces does it in the same task, before.
    pub async fn evicted_telling(&mut self, mut more: impl FnMut() -> Option<Bytes>) -> ImmediateReply {
        poll_fn(|cx| {
            while self.poll_send(cx).is_ready()
                && let Some(piece) = more()
            {
                // Without a stream the piece has nowhere to go.
                if self.out.is_some() {
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

    /// The response is over: tells `rest` of its body and the end, closes the sending side, and leaves the EPP a moment to
    /// close the other.
    pub fn finish(mut self, rest: Vec<Bytes>) {
        let last = rest.len();
        for (number, piece) in (1..).zip(rest) {
            self.exchange.response_body(piece, number == last);
        }
        self.exchange.response_end();
        let endings = self.endings.clone();
        endings.spawn(async move {
            // The EPP may take more only when its replies are taken.
            let told =
                poll_fn(|cx| if self.poll_replies(cx).is_ready() { Poll::Ready(()) } else { self.poll_send(cx) });
            if timeout(REST, told).await.is_ok() {
                self.out = None;
                let _ = timeout(CLOSE, poll_fn(|cx| self.poll_replies(cx))).await;
            }
        });
    }

    /// Takes whatever the EPP says, until its stream is over. It is of no consequence any more.
    fn poll_replies(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(event) = ready!(self.poll_event(cx)) {
            if let Ok(Event::ResponseHead(_)) = event {
                self.silence.late(Instant::now());
            }
        }
        Poll::Ready(())
    }

    /// None: the stream is over and its outcome has been given.
    fn poll_outcome(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Outcome>, PickError>> {
        loop {
            match ready!(self.poll_event(cx)) {
                Some(Ok(Event::Outcome(outcome))) => return Poll::Ready(Ok(Some(outcome))),
                Some(Ok(Event::ResponseHead(_) | Event::Excessive)) => {}
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
            if matches!(self.answer, Answer::Over) {
                return Poll::Ready(None);
            }
            ready!(self.poll_answer(cx));
        }
    }

    /// One step of the EPP's side, into the exchange.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.answer {
            Answer::Awaited(call) => match ready!(call.poll_unpin(cx)) {
                Ok((replies, http2)) => self.answer = Answer::Open(Box::new(replies), http2),
                Err(error) => self.over(|exchange| exchange.failed(error)),
            },
            Answer::Open(replies, http2) => match ready!(replies.poll_next_unpin(cx)) {
                Some(Ok(reply)) => self.exchange.receive(reply),
                Some(Err(status)) => {
                    let error = failure(&status, http2, self.exchange.answered());
                    self.over(|exchange| exchange.failed(error));
                }
                None => self.over(Exchange::closed),
            },
            Answer::Over => {}
        }
        Poll::Ready(())
    }

    fn over(&mut self, end: impl FnOnce(&mut Exchange)) {
        self.answer = Answer::Over;
        self.out = None;
        end(&mut self.exchange);
    }

    /// Ready when every message has left, or never will.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(out) = &mut self.out
            && self.exchange.has_message()
        {
            // A channel without a receiver is a stream that is over; the EPP's side says why.
            let sent = ready!(out.poll_reserve(cx)).is_ok()
                && self.exchange.next_message().is_none_or(|message| out.send_item(message).is_ok());
            if !sent {
                self.out = None;
            }
        }
        Poll::Ready(())
    }
}

struct CancelOnDrop(Option<CancellationHandle>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            handle.cancel();
        }
    }
}

#[cfg(test)]
mod tests;
