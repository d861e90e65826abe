//! The light picker of the conformance suite: it replies to each piece of body, without content, before the headers. It picks among
//! the endpoints in the header `test-epp-endpoint-selection` (`ip[:port],...`), never changes a body, names the served endpoint on
//! the response, and fails only with gRPC statuses.

use std::net::SocketAddr;

use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_proto::health::health_check_response::ServingStatus;
use tonic::Status;

use super::{Answer, End, Endpoints, Exchange, Fields, Personality, Refusal, Script, borrowed, owned};
use crate::scripted_epp::{header, reply};

/// A larger body is an error.
const MAX_BODY: usize = 10 << 20;

pub struct Lwepp {
    endpoints: Endpoints,
    added: Fields,
}

impl Lwepp {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self::over(Endpoints::new(endpoints))
    }

    async fn answer(&self, exchange: &mut Exchange) -> Answer {
        let told = header(&exchange.request_headers, "test-epp-endpoint-selection");
        // The request's selection precedes the subset.
        let allowed = told.map(|list| self.endpoints.named(list)).or_else(|| exchange.subset());
        let Some(picked) = self.endpoints.pick(allowed.as_deref()) else {
            return Err(End::Status(Status::internal("no endpoint to pick")));
        };
        let mut fields = vec![("X-Echo-Set-Header", "x-picked-by:lwepp")];
        fields.extend(borrowed(&self.added));
        let message = reply::pick(&picked, &fields);
        (exchange.picked, exchange.echoes) = (Some(picked), false);
        exchange.send(message).await
    }
}

#[tonic::async_trait]
impl Script for Lwepp {
    fn health(&self, service: &str) -> Result<ServingStatus, Status> {
        super::known_as(&["inference-extension"], service)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.answer(exchange).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if exchange.request_body.len() > MAX_BODY {
            return Err(End::Status(Status::internal("request body too large")));
        }
        exchange.send(reply::request_body_unchanged()).await?;
        if body.end_of_stream { self.answer(exchange).await } else { Ok(()) }
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        let served = exchange.served().unwrap_or_default();
        exchange.send(reply::response_headers(&[("x-conformance-test-served-endpoint", &served)])).await
    }

    async fn response_body(&self, exchange: &mut Exchange, _body: &HttpBody) -> Answer {
        exchange.send(reply::response_body_unchanged()).await
    }
}

impl Personality for Lwepp {
    fn over(endpoints: Endpoints) -> Self {
        Self { endpoints, added: Fields::new() }
    }

    fn adding(self, fields: &[(&str, &str)]) -> Self {
        Self { added: owned(fields), ..self }
    }

    fn rewriting(self, _: &str) -> Self {
        self
    }

    fn sent_on(body: &[u8], _: Option<&str>) -> Vec<u8> {
        body.to_vec()
    }

    fn mark(served: SocketAddr) -> (&'static str, String) {
        ("x-conformance-test-served-endpoint", served.to_string())
    }

    fn refusal(_: bool) -> Refusal {
        Refusal::Fails
    }
}
