//! A script that evicts requests when a test says so, at any moment after the pick, like flow control under pressure.

use std::sync::Arc;

use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_proto::health::health_check_response::ServingStatus;
use tokio::sync::Notify;
use tonic::Status;

use super::{Answer, End, Exchange, Script, reply};

/// When it waits for the notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// After the pick, before it reads anything about the response.
    Pick,
    /// After it has replied to the response head.
    ResponseHead,
}

/// `inner`, with an eviction (429) of each request on notification.
pub struct Evicting<S> {
    pub inner: S,
    pub after: After,
    pub now: Arc<Notify>,
}

impl<S> Evicting<S> {
    async fn evict(&self, exchange: &mut Exchange, moment: After) -> Answer {
        if self.after != moment {
            return Ok(());
        }
        self.now.notified().await;
        let why = [("x-llm-d-request-dropped-reason", "evicted")];
        exchange.send(reply::immediate(429, &why, "request evicted by flow control")).await?;
        Err(End::Close)
    }
}

#[tonic::async_trait]
impl<S: Script> Script for Evicting<S> {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        self.inner.health(service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.inner.request_headers(exchange, headers).await?;
        if headers.end_of_stream { self.evict(exchange, After::Pick).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.request_body(exchange, body).await?;
        if body.end_of_stream { self.evict(exchange, After::Pick).await } else { Ok(()) }
    }

    async fn response_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.inner.response_headers(exchange, headers).await?;
        self.evict(exchange, After::ResponseHead).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.response_body(exchange, body).await
    }
}
