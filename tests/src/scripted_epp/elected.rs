//! Replicas of one picker with an elected leader: only the leader's health reports serving.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use penstock_proto::ext_proc::{HttpBody, HttpHeaders, HttpTrailers};
use penstock_proto::health::health_check_response::ServingStatus;
use tonic::Status;

use super::{Answer, End, Exchange, Script, reply};

/// The current leader. Clones share the election.
#[derive(Clone, Default)]
pub struct Election(Arc<AtomicUsize>);

impl Election {
    /// From now on this replica leads.
    pub fn leads(&self, replica: usize) {
        self.0.store(replica, Ordering::Relaxed);
    }

    #[must_use]
    pub fn leader(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a replica that is not the leader does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follower {
    Answers,
    /// UNAVAILABLE at the first message.
    Refuses,
    /// An immediate 503: it has no endpoint.
    KnowsNothing,
}

/// `inner` as one of several replicas.
pub struct Elected<S> {
    pub inner: S,
    pub replica: usize,
    pub election: Election,
    pub follower: Follower,
}

#[tonic::async_trait]
impl<S: Script> Script for Elected<S> {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        if self.election.leader() == self.replica || service == "liveness" {
            self.inner.health(service)
        } else {
            Ok(ServingStatus::NotServing)
        }
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if self.election.leader() != self.replica {
            match self.follower {
                Follower::Answers => {}
                Follower::Refuses => return Err(End::Status(Status::unavailable("not the leader"))),
                Follower::KnowsNothing => {
                    exchange.send(reply::immediate(503, &[], "no candidate pods available")).await?;
                    return Err(End::Close);
                }
            }
        }
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.request_body(exchange, body).await
    }

    async fn request_trailers(&self, exchange: &mut Exchange, trailers: &HttpTrailers) -> Answer {
        self.inner.request_trailers(exchange, trailers).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.inner.response_headers(exchange, headers).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.response_body(exchange, body).await
    }

    async fn response_trailers(&self, exchange: &mut Exchange, trailers: &HttpTrailers) -> Answer {
        self.inner.response_trailers(exchange, trailers).await
    }

    async fn half_close(&self, exchange: &mut Exchange) -> Answer {
        self.inner.half_close(exchange).await
    }
}
