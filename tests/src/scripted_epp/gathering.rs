//! A script that gathers requests: it answers none of the first few before all of them wait.

use std::sync::atomic::{AtomicUsize, Ordering};

use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_proto::health::health_check_response::ServingStatus;
use tokio::sync::Barrier;
use tonic::Status;

use super::fault::Harm;
use super::{Answer, Exchange, Script};

/// `inner`, for gathered requests.
pub struct Gathering<S> {
    inner: S,
    all: Barrier,
    /// Streams still expected.
    awaited: AtomicUsize,
    harm: Option<Harm>,
}

impl<S: Script> Gathering<S> {
    pub fn new(inner: S, streams: usize) -> Self {
        Self { inner, all: Barrier::new(streams), awaited: AtomicUsize::new(streams), harm: None }
    }

    /// Answers none of them: this fault strikes the last, and the others keep waiting.
    #[must_use]
    pub fn then(self, harm: Harm) -> Self {
        Self { harm: Some(harm), ..self }
    }

    /// Called at the end of a request.
    async fn gather(&self, exchange: &mut Exchange) -> Answer {
        if self.awaited.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |awaited| awaited.checked_sub(1)).is_err() {
            return Ok(());
        }
        let last = self.all.wait().await.is_leader();
        match self.harm {
            None => Ok(()),
            Some(harm) if last => harm.strike(exchange).await,
            Some(_) => std::future::pending().await,
        }
    }
}

#[tonic::async_trait]
impl<S: Script> Script for Gathering<S> {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        self.inner.health(service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream {
            self.gather(exchange).await?;
        }
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream {
            self.gather(exchange).await?;
        }
        self.inner.request_body(exchange, body).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.inner.response_headers(exchange, headers).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.response_body(exchange, body).await
    }
}
