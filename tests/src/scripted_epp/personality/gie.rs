//! The Gateway API Inference Extension's picker, v1.5, the most widely installed. It rewrites every JSON body, which changes the
//! order of its members, and echoes every field of request and response.

use std::net::SocketAddr;

use bytes::Bytes;
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_proto::health::health_check_response::ServingStatus;
use serde_json::{Value, json};
use tonic::Status;

use super::{Answer, Endpoints, Exchange, Fields, Personality, Refusal, Script, echo, owned};

pub struct Gie {
    endpoints: Endpoints,
    rewrite: Option<String>,
    added: Fields,
}

#[tonic::async_trait]
impl Script for Gie {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        super::known_as(&super::SERVICES, service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { echo(&self.endpoints, &self.added, exchange, None).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        super::parsed(exchange).await?;
        let body = Bytes::from(Self::sent_on(&exchange.request_body, self.rewrite.as_deref()));
        echo(&self.endpoints, &self.added, exchange, Some(&body)).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        super::echo_response_head(exchange).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        super::echo_response_body(exchange, body).await
    }
}

impl Personality for Gie {
    fn over(endpoints: Endpoints) -> Self {
        Self { endpoints, rewrite: None, added: Fields::new() }
    }

    fn adding(self, fields: &[(&str, &str)]) -> Self {
        Self { added: owned(fields), ..self }
    }

    fn rewriting(self, model: &str) -> Self {
        Self { rewrite: Some(model.to_owned()), ..self }
    }

    /// Members in the order of their names, without blanks.
    fn sent_on(body: &[u8], rewritten: Option<&str>) -> Vec<u8> {
        let Ok(mut body) = serde_json::from_slice::<Value>(body) else { return body.to_vec() };
        if let Some(model) = rewritten {
            body["model"] = json!(model);
        }
        body.to_string().into_bytes()
    }

    fn mark(_: SocketAddr) -> (&'static str, String) {
        ("x-went-into-resp-headers", "true".to_owned())
    }

    fn refusal(has_body: bool) -> Refusal {
        Refusal::Immediate(if has_body { 503 } else { 500 })
    }
}
