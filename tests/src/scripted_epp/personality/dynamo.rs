//! Dynamo's picker: it requires the full-duplex protocol configuration, sets explicit append actions, removes fields, puts token
//! ids into the body, and takes the last of a list as the served endpoint.

use std::net::SocketAddr;

use bytes::Bytes;
use penstock_proto::core::header_value_option::HeaderAppendAction;
use penstock_proto::ext_proc::{BodySendMode, HeaderMutation, HttpBody, HttpHeaders};
use serde_json::{Value, json};
use tonic::Status;

use super::{Answer, End, Endpoints, Exchange, Fields, Personality, Refusal, Script, borrowed, failure, owned};
use crate::scripted_epp::reply;

pub struct Dynamo {
    endpoints: Endpoints,
    rewrite: Option<String>,
    added: Fields,
}

/// The fields it removes from a request.
const REMOVED: [&str; 2] = ["x-gateway-destination-endpoint-subset", "x-dynamo-request-control"];

fn overwriting(fields: &[(&str, &str)]) -> HeaderMutation {
    let mut mutation = reply::mutation(fields);
    for set in &mut mutation.set_headers {
        set.append_action = HeaderAppendAction::OverwriteIfExistsOrAdd.into();
    }
    mutation
}

impl Dynamo {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self::over(Endpoints::new(endpoints))
    }

    async fn answer(&self, exchange: &mut Exchange, length: Option<usize>) -> Answer {
        let Some(picked) = self.endpoints.pick(exchange.subset().as_deref()) else {
            return failure(exchange, 503, "ServiceUnavailable", "no workers").await;
        };
        let length = length.map(|length| length.to_string());
        let mut fields = vec![(reply::DESTINATION, picked.as_str()), ("x-worker-instance-id", "1")];
        fields.extend(length.iter().map(|length| ("content-length", length.as_str())));
        fields.extend(borrowed(&self.added));
        let mut mutation = overwriting(&fields);
        mutation.remove_headers = REMOVED.map(str::to_owned).to_vec();
        let mut message = reply::request_headers(mutation);
        message.dynamic_metadata = Some(reply::destination(&picked));
        (exchange.picked, exchange.echoes) = (Some(picked), false);
        exchange.send(message).await
    }
}

#[tonic::async_trait]
impl Script for Dynamo {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        let duplex = i32::from(BodySendMode::FullDuplexStreamed);
        let strict = exchange.protocol_config.is_none_or(|config| {
            let modes = (config.request_body_mode, config.response_body_mode);
            modes == (duplex, duplex) && config.send_body_without_waiting_for_header_response
        });
        if !strict {
            return Err(End::Status(Status::failed_precondition("body mode must be FULL_DUPLEX_STREAMED")));
        }
        if headers.end_of_stream { self.answer(exchange, None).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        super::parsed(exchange).await?;
        let body = Bytes::from(Self::sent_on(&exchange.request_body, self.rewrite.as_deref()));
        self.answer(exchange, Some(body.len())).await?;
        for message in reply::request_body(&body) {
            exchange.send(message).await?;
        }
        Ok(())
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        let served = exchange.served().unwrap_or_default();
        let last = served.rsplit(',').next().unwrap_or_default().trim();
        let mark = overwriting(&[("x-dynamo-backend-instance-id", last)]);
        exchange.send(reply::response_mutation(mark)).await
    }
}

impl Personality for Dynamo {
    fn over(endpoints: Endpoints) -> Self {
        Self { endpoints, rewrite: None, added: Fields::new() }
    }

    fn adding(self, fields: &[(&str, &str)]) -> Self {
        Self { added: owned(fields), ..self }
    }

    fn rewriting(self, model: &str) -> Self {
        Self { rewrite: Some(model.to_owned()), ..self }
    }

    fn sent_on(body: &[u8], rewritten: Option<&str>) -> Vec<u8> {
        let Ok(mut body) = serde_json::from_slice::<Value>(body) else { return body.to_vec() };
        body["nvext"] = json!({"token_data": [1, 2, 3]});
        if let Some(model) = rewritten {
            body["model"] = json!(model);
        }
        body.to_string().into_bytes()
    }

    fn mark(served: SocketAddr) -> (&'static str, String) {
        ("x-dynamo-backend-instance-id", served.to_string())
    }

    fn refusal(_: bool) -> Refusal {
        Refusal::Immediate(503)
    }
}
