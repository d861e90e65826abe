//! Pickers as they are in the field, as far as their peer can tell them apart: the production one of llm-d, the light one
//! that conformance tests use, and Dynamo's, which insists. Which endpoint is picked is the same plain rule for all.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use penstock_proto::core::header_value_option::HeaderAppendAction;
use penstock_proto::ext_proc::{BodySendMode, HttpBody, HttpHeaders};
use serde_json::{Value, json};
use tonic::Status;

use super::{Answer, End, Exchange, Script, header, reply};

/// Round robin over the endpoints that the subset allows. A test changes `offer` to have a list.
pub struct Endpoints {
    endpoints: Vec<String>,
    next: AtomicUsize,
    offer: usize,
}

impl Endpoints {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        let endpoints = endpoints.iter().map(ToString::to_string).collect();
        Self { endpoints, next: AtomicUsize::new(0), offer: 1 }
    }

    /// Names this many endpoints, the first choice first.
    #[must_use]
    pub fn offering(self, offer: usize) -> Self {
        Self { offer, ..self }
    }

    /// `ip:port`, or several with commas; `None` when there is none to pick.
    fn pick(&self, subset: Option<&[String]>) -> Option<String> {
        let allowed = |one: &&String| subset.is_none_or(|subset| subset.contains(one));
        let allowed: Vec<&String> = self.endpoints.iter().filter(allowed).collect();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let offer = self.offer.clamp(1, allowed.len().max(1));
        let named: Vec<&str> =
            allowed.iter().cycle().skip(first % allowed.len().max(1)).take(offer).map(|one| one.as_str()).collect();
        (!named.is_empty()).then(|| named.join(","))
    }
}

fn text(headers: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    headers.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// The picker of GIE v1 and of llm-d.
pub struct Production {
    endpoints: Endpoints,
    rewrite: Option<String>,
    skip_response: bool,
}

impl Production {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self::over(Endpoints::new(endpoints))
    }

    #[must_use]
    pub fn over(endpoints: Endpoints) -> Self {
        Self { endpoints, rewrite: None, skip_response: false }
    }

    /// Replaces the model in the request's body.
    #[must_use]
    pub fn rewriting(self, model: &str) -> Self {
        Self { rewrite: Some(model.to_owned()), ..self }
    }

    /// Closes the stream with status OK after the request phase.
    #[must_use]
    pub fn skipping_response(self) -> Self {
        Self { skip_response: true, ..self }
    }

    /// Picks and answers the headers; `length` is the body's after all rewriting.
    async fn answer(&self, exchange: &mut Exchange, length: Option<usize>) -> Answer {
        let Some(picked) = self.endpoints.pick(exchange.subset().as_deref()) else {
            return failure(exchange, 503, "ServiceUnavailable", "no candidate pods available").await;
        };
        let echoed = exchange.request_headers.clone();
        let length = length.map(|length| length.to_string());
        let mut headers: Vec<(&str, &str)> = length.iter().map(|length| ("Content-Length", length.as_str())).collect();
        // Every header again, as Go's map leaves them: of a repeated one the last value only.
        for (name, value) in text(&echoed) {
            if name != "content-length" && !name.starts_with(reply::DESTINATION) {
                headers.retain(|(before, _)| *before != name);
                headers.push((name, value));
            }
        }
        let message = reply::pick(&picked, &headers);
        exchange.picked = Some(picked);
        exchange.send(message).await
    }

    fn after_request(&self) -> Answer {
        if self.skip_response { Err(End::Close) } else { Ok(()) }
    }
}

async fn failure(exchange: &mut Exchange, status: u16, code: &str, why: &str) -> Answer {
    exchange.send(reply::immediate(status, &[], &format!("inference error: {code} - {why}"))).await?;
    Err(End::Close)
}

#[tonic::async_trait]
impl Script for Production {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if !headers.end_of_stream {
            return Ok(());
        }
        self.answer(exchange, None).await?;
        self.after_request()
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        let parsed = serde_json::from_slice::<Value>(&exchange.request_body);
        let Ok(Value::Object(mut fields)) = parsed else {
            return failure(exchange, 400, "BadRequest", "invalid JSON").await;
        };
        if !fields.get("model").is_some_and(Value::is_string) {
            return failure(exchange, 400, "BadRequest", "model not found in request body").await;
        }
        let body = match &self.rewrite {
            Some(model) => {
                fields.insert("model".to_owned(), json!(model));
                Bytes::from(Value::Object(fields).to_string())
            }
            None => Bytes::from(exchange.request_body.clone()),
        };
        self.answer(exchange, Some(body.len())).await?;
        for message in reply::request_body(&body) {
            exchange.send(message).await?;
        }
        self.after_request()
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        let echoed = exchange.response_headers.clone();
        let mut headers: Vec<_> = text(&echoed).collect();
        headers.push(("x-went-into-resp-headers", "true"));
        exchange.send(reply::response_headers(&headers)).await
    }

    /// Events one by one; anything else is held until it is whole.
    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        let kind = header(&exchange.response_headers, "content-type").unwrap_or_default();
        if kind.contains("text/event-stream") {
            return exchange.send(reply::response_body(body.body.clone(), body.end_of_stream)).await;
        }
        exchange.held.extend_from_slice(&body.body);
        if body.end_of_stream {
            let whole = Bytes::from(std::mem::take(&mut exchange.held));
            exchange.send(reply::response_body(whole, true)).await?;
        }
        Ok(())
    }
}

/// The light picker of the conformance suite: an empty reply to each piece of body, before the one to the headers; it
/// obeys the header `test-epp-endpoint-selection`, and fails with gRPC statuses only.
pub struct Lwepp {
    endpoints: Endpoints,
}

impl Lwepp {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self { endpoints: Endpoints::new(endpoints) }
    }

    async fn answer(&self, exchange: &mut Exchange) -> Answer {
        let told = header(&exchange.request_headers, "test-epp-endpoint-selection").map(str::to_owned);
        let Some(picked) = told.or_else(|| self.endpoints.pick(exchange.subset().as_deref())) else {
            return Err(End::Status(Status::internal("no endpoint to pick")));
        };
        let message = reply::pick(&picked, &[("X-Echo-Set-Header", "x-picked-by:lwepp")]);
        exchange.picked = Some(picked);
        exchange.send(message).await
    }
}

#[tonic::async_trait]
impl Script for Lwepp {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.answer(exchange).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
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

/// Dynamo's picker: it refuses any protocol configuration but the full-duplex one, removes headers, says how each header is
/// to be set, and puts token ids into the body.
pub struct Dynamo {
    endpoints: Endpoints,
}

/// What it takes off a request.
const REMOVED: [&str; 2] = ["x-gateway-destination-endpoint-subset", "x-dynamo-request-control"];

impl Dynamo {
    #[must_use]
    pub fn new(endpoints: &[SocketAddr]) -> Self {
        Self { endpoints: Endpoints::new(endpoints) }
    }

    async fn answer(&self, exchange: &mut Exchange, length: Option<usize>) -> Answer {
        let Some(picked) = self.endpoints.pick(exchange.subset().as_deref()) else {
            return failure(exchange, 503, "ServiceUnavailable", "no workers").await;
        };
        let length = length.map(|length| length.to_string());
        let mut headers = vec![(reply::DESTINATION, picked.as_str()), ("x-worker-instance-id", "1")];
        headers.extend(length.iter().map(|length| ("content-length", length.as_str())));
        let mut mutation = reply::mutation(&headers);
        for set in &mut mutation.set_headers {
            set.append_action = HeaderAppendAction::OverwriteIfExistsOrAdd.into();
        }
        mutation.remove_headers = REMOVED.map(str::to_owned).to_vec();
        let mut message = reply::request_headers(mutation);
        message.dynamic_metadata = Some(reply::destination(&picked));
        exchange.picked = Some(picked);
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
            return Err(End::Status(Status::failed_precondition("bodies have to be FULL_DUPLEX_STREAMED")));
        }
        if headers.end_of_stream { self.answer(exchange, None).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if !body.end_of_stream {
            return Ok(());
        }
        let Ok(Value::Object(mut fields)) = serde_json::from_slice::<Value>(&exchange.request_body) else {
            return failure(exchange, 400, "BadRequest", "invalid JSON").await;
        };
        fields.insert("nvext".to_owned(), json!({"token_data": [1, 2, 3]}));
        let body = Bytes::from(Value::Object(fields).to_string());
        self.answer(exchange, Some(body.len())).await?;
        for message in reply::request_body(&body) {
            exchange.send(message).await?;
        }
        Ok(())
    }
}
