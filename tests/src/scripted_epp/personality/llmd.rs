//! The picker of llm-d's router, a successor of GIE's: it leaves a body unchanged unless needed, may close the stream after the
//! request, and may evict it (see [`Evicting`](crate::scripted_epp::Evicting)).

use std::net::SocketAddr;

use bytes::Bytes;
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_proto::health::health_check_response::ServingStatus;
use serde_json::{Value, json};
use tonic::Status;

use super::{Answer, End, Endpoints, Exchange, Fields, Personality, Refusal, Script, echo, owned};

pub struct LlmdRouter {
    endpoints: Endpoints,
    rewrite: Option<String>,
    added: Fields,
    skip_response: bool,
}

impl LlmdRouter {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self::over(Endpoints::new(endpoints))
    }

    #[must_use]
    pub fn over(endpoints: Endpoints) -> Self {
        Self { endpoints, rewrite: None, added: Fields::new(), skip_response: false }
    }

    /// Replaces the model in the request body.
    #[must_use]
    pub fn rewriting(self, model: &str) -> Self {
        Self { rewrite: Some(model.to_owned()), ..self }
    }

    /// Closes the stream with status OK after the request phase.
    #[must_use]
    pub fn skipping_response(self) -> Self {
        Self { skip_response: true, ..self }
    }

    async fn answer(&self, exchange: &mut Exchange, body: Option<&Bytes>) -> Answer {
        echo(&self.endpoints, &self.added, exchange, body).await?;
        if self.skip_response { Err(End::Close) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Script for LlmdRouter {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        super::known_as(&super::SERVICES, service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.answer(exchange, None).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        super::parsed(exchange).await?;
        let body = Bytes::from(Self::sent_on(&exchange.request_body, self.rewrite.as_deref()));
        self.answer(exchange, Some(&body)).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        super::echo_response_head(exchange).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        super::echo_response_body(exchange, body).await
    }
}

impl Personality for LlmdRouter {
    fn over(endpoints: Endpoints) -> Self {
        Self::over(endpoints)
    }

    fn adding(self, fields: &[(&str, &str)]) -> Self {
        Self { added: owned(fields), ..self }
    }

    fn rewriting(self, model: &str) -> Self {
        self.rewriting(model)
    }

    /// Rewritten only if something changes.
    fn sent_on(body: &[u8], rewritten: Option<&str>) -> Vec<u8> {
        match (serde_json::from_slice::<Value>(body), rewritten) {
            (Ok(mut body), Some(model)) => {
                body["model"] = json!(model);
                body.to_string().into_bytes()
            }
            _ => body.to_vec(),
        }
    }

    fn mark(_: SocketAddr) -> (&'static str, String) {
        ("x-went-into-resp-headers", "true".to_owned())
    }

    fn refusal(has_body: bool) -> Refusal {
        Refusal::Immediate(if has_body { 503 } else { 500 })
    }
}
