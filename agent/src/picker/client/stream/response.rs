//! The response on a request's stream: what the EPP gets of it, and what the EPP says about it.

use std::{
    net::SocketAddr,
    task::{Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::{FutureExt as _, poll_fn};
use penstock_proto::ext_proc::HeaderMutation;
use tokio::time::timeout;

use super::{Channel, PickStream};
use crate::picker::{
    exchange::{Event, ImmediateReply, Outcome},
    returned::Answer,
    silence::HeadReply,
};

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
    /// The EPP replied to the head.
    Head(ResponseReply),
    /// The EPP wants nothing of the body, and leaves it unchanged.
    Declined,
    Answer(Answer),
    /// The EPP replied to the trailers. `None` if its mutation exceeds the limits and is not applied.
    Trailers(Option<HeaderMutation>),
    Evicted(ImmediateReply),
    /// The EPP ended the stream with status OK.
    Closed,
    /// The stream was lost, or the EPP ended it with an error.
    Failed,
}

impl PickStream {
    /// Sends the head of the response from `served`, and waits at most `wait` for the EPP's mutation. Does not wait if `wait` is
    /// `None` or the EPP is known to be silent about heads. If it is cancelled, the head is still sent and the reply is lost. A later
    /// reply is returned by [`heard`](Self::heard).
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
                    Some(Ok(event @ (Event::ResponseBody(_) | Event::ResponseTrailers(_)))) => {
                        self.exchange.put_back(event);
                        return Poll::Ready(ResponseReply::Mutation(None));
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

    /// Whether the EPP wants nothing more of the response: it has ended the stream with status OK, or declined the body.
    pub fn wants_no_more(&self) -> bool {
        matches!(self.channel, Channel::Over) && !self.failed || self.exchange.declines_body()
    }

    /// Whether the EPP may still reply to the response's head, which has not gone out.
    pub fn awaits_head_reply(&self) -> bool {
        !matches!(self.channel, Channel::Over) && self.exchange.awaits_head_reply()
    }

    /// The response's head goes out.
    pub fn settle_head(&mut self) {
        self.exchange.settle_head();
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

    /// Whether the EPP replies to trailers, as far as is known.
    pub fn replies_to_trailers(&self) -> bool {
        self.silence.replies_to_trailers(Instant::now())
    }

    /// Whether the EPP replied to the trailers in time.
    pub fn note_trailers(&self, answered: bool) {
        if answered {
            self.silence.trailers_answered();
        } else {
            self.silence.trailers_unanswered(Instant::now());
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
                    Some(Ok(Event::ResponseHead(mutation))) => {
                        self.silence.late(Instant::now());
                        return Poll::Ready(Heard::Head(ResponseReply::Mutation(Some(mutation))));
                    }
                    Some(Ok(Event::Excessive)) => return Poll::Ready(Heard::Head(ResponseReply::Excessive)),
                    Some(Ok(Event::ResponseDeclined)) => return Poll::Ready(Heard::Declined),
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
}
