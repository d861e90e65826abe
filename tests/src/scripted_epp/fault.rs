//! Wraps a script and makes it fail at a chosen moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use penstock_proto::ext_proc::{HttpBody, HttpHeaders, HttpTrailers};
use penstock_proto::health::health_check_response::ServingStatus;
use tonic::{Code, Status};

use super::{Accept, Answer, End, Exchange, Script, reply};

/// When a fault strikes. The inner script does not see the messages of that kind beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    RequestHeaders,
    /// With the message that brings the request body to this many bytes, or ends it.
    RequestBody(usize),
    /// After the reply to the request head is sent.
    HeaderReply,
    ResponseHeaders,
    ResponseBody,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Nothing more is read or answered on the stream.
    Silence,
    /// The script continues after this.
    Delay(Duration),
    ResetConnection,
    /// See [`End::Die`].
    Die,
    Status(Code),
    /// The stream closes with status OK.
    Close,
    /// An immediate reply with this status, then the stream closes. After dispatch this is an eviction.
    Immediate(u16),
}

impl Harm {
    pub(super) async fn strike(self, exchange: &mut Exchange) -> Answer {
        match self {
            Self::Silence => std::future::pending().await,
            Self::Delay(duration) => {
                tokio::time::sleep(duration).await;
                Ok(())
            }
            Self::ResetConnection => Err(End::ResetConnection),
            Self::Die => Err(End::Die),
            Self::Status(code) => Err(End::Status(Status::new(code, "scripted"))),
            Self::Close => Err(End::Close),
            Self::Immediate(status) => {
                let why = [("x-llm-d-request-dropped-reason", "evicted")];
                let message = reply::immediate(status, &why, "request evicted by flow control");
                // Not a reply to the head, so no further fault strikes after it.
                let _ = exchange.replies().send(Ok(message)).await;
                Err(End::Close)
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Connections are accepted and then ignored.
    Deaf,
    /// Connections are reset when accepted.
    ResetAtAccept,
    At(Moment, Harm),
}

/// `inner`, with a fault in the first `times` streams (or connections); by default in all.
pub struct Faulty<S> {
    inner: S,
    fault: Fault,
    left: AtomicU64,
}

impl<S: Script> Faulty<S> {
    pub fn new(inner: S, fault: Fault) -> Self {
        Self { inner, fault, left: AtomicU64::new(u64::MAX) }
    }

    /// Limits the number of faults.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { left: AtomicU64::new(times), ..self }
    }

    /// Uses up one fault, if any are left.
    fn due(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    async fn at(&self, exchange: &mut Exchange, now: impl Fn(Moment) -> bool) -> Answer {
        match self.fault {
            Fault::At(moment, harm) if now(moment) && self.due() => harm.strike(exchange).await,
            _ => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl<S: Script> Script for Faulty<S> {
    fn accept(&self) -> Accept {
        match self.fault {
            Fault::Deaf if self.due() => Accept::Silent,
            Fault::ResetAtAccept if self.due() => Accept::Reset,
            _ => self.inner.accept(),
        }
    }

    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        self.inner.health(service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if let Fault::At(Moment::HeaderReply, harm) = self.fault
            && self.due()
        {
            exchange.after_header_reply = Some(harm);
        }
        self.at(exchange, |moment| moment == Moment::RequestHeaders).await?;
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        let (now, before) = (exchange.request_body.len(), exchange.request_body.len() - body.body.len());
        let reached = |at| (before < at && at <= now) || (body.end_of_stream && now < at) || (at == 0 && before == 0);
        self.at(exchange, |moment| matches!(moment, Moment::RequestBody(at) if reached(at))).await?;
        self.inner.request_body(exchange, body).await
    }

    async fn request_trailers(&self, exchange: &mut Exchange, trailers: &HttpTrailers) -> Answer {
        self.inner.request_trailers(exchange, trailers).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.at(exchange, |moment| moment == Moment::ResponseHeaders).await?;
        self.inner.response_headers(exchange, headers).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.at(exchange, |moment| moment == Moment::ResponseBody).await?;
        self.inner.response_body(exchange, body).await
    }

    async fn response_trailers(&self, exchange: &mut Exchange, trailers: &HttpTrailers) -> Answer {
        self.inner.response_trailers(exchange, trailers).await
    }

    async fn half_close(&self, exchange: &mut Exchange) -> Answer {
        self.inner.half_close(exchange).await
    }
}
