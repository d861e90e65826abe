//! Pickers as they are in the field, as far as their peer can tell them apart: GIE's of v1.5, llm-d's router, the light one
//! that conformance tests use, and Dynamo's, which insists. Which endpoint is picked is the same plain rule for all.
//!
//! [`Personality`] is what a test needs to know to run the same scenario against each of them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use penstock_proto::ext_proc::HttpBody;
use penstock_proto::health::health_check_response::ServingStatus;
use serde_json::Value;
use tonic::Status;

use super::{Answer, End, Exchange, Script, header, reply};

mod dynamo;
mod gie;
mod llmd;
mod lwepp;

pub use dynamo::Dynamo;
pub use gie::Gie;
pub use llmd::LlmdRouter;
pub use lwepp::Lwepp;

/// The picker of tests that are not about pickers.
pub type Production = LlmdRouter;

/// What a picker does to a request that finds no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It answers the client with this status.
    Immediate(u16),
    /// It fails, and the pool's failure mode decides.
    Fails,
}

pub trait Personality: Script + Sized {
    fn over(endpoints: Endpoints) -> Self;

    /// Sets these fields on every request.
    #[must_use]
    fn adding(self, fields: &[(&str, &str)]) -> Self;

    /// Puts this model into every request's body; a picker that never changes bodies ignores it.
    #[must_use]
    fn rewriting(self, model: &str) -> Self;

    /// What the endpoint gets for a client's JSON body.
    fn sent_on(body: &[u8], rewritten: Option<&str>) -> Vec<u8>;

    /// The field that it puts on a response of `served`, and its value.
    fn mark(served: SocketAddr) -> (&'static str, String);

    /// Without an endpoint to pick, for a request with or without a body.
    fn refusal(has_body: bool) -> Refusal;
}

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

    /// Those that a list of `ip:port`, or of `ip` for all ports there, names.
    fn named(&self, list: &str) -> Vec<String> {
        let names = |entry: &str, one: &str| entry == one || one.rsplit_once(':').is_some_and(|(ip, _)| ip == entry);
        let named = |one: &&String| list.split(',').any(|entry| names(entry.trim(), one));
        self.endpoints.iter().filter(named).cloned().collect()
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

/// The names that GIE's code base has for its health.
const SERVICES: [&str; 3] = ["liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"];

/// Serving under these names, and says of others that it does not know them.
fn known_as(services: &[&str], service: &str) -> Result<ServingStatus, Status> {
    Ok(if services.contains(&service) { ServingStatus::Serving } else { ServingStatus::ServiceUnknown })
}

/// Fields that a test has a picker set.
type Fields = Vec<(String, String)>;

fn owned(fields: &[(&str, &str)]) -> Fields {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn borrowed(fields: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// Picks and answers as GIE's code base does: the pick, the body's length, what the test wants, and every field of the request
/// again, as Go's map leaves them (of a repeated one the last value only); then the whole body.
async fn echo(endpoints: &Endpoints, added: &Fields, exchange: &mut Exchange, body: Option<&Bytes>) -> Answer {
    // Of the last message: what earlier ones said is forgotten.
    let Some(picked) = endpoints.pick(exchange.subset().as_deref()) else {
        return match body {
            Some(_) => failure(exchange, 503, "ServiceUnavailable", "no candidate pods available").await,
            None => failure(exchange, 500, "Internal", "no pods available").await,
        };
    };
    let length = body.map(|body| body.len().to_string());
    let echoed = exchange.request_headers.clone();
    let mut fields: Vec<(&str, &str)> = length.iter().map(|length| ("Content-Length", length.as_str())).collect();
    for (name, value) in borrowed(&echoed).chain(borrowed(added)) {
        if name != "content-length" && !name.starts_with(reply::DESTINATION) {
            fields.retain(|(before, _)| *before != name);
            fields.push((name, value));
        }
    }
    let message = reply::pick(&picked, &fields);
    exchange.picked = Some(picked);
    exchange.send(message).await?;
    for message in body.into_iter().flat_map(reply::request_body) {
        exchange.send(message).await?;
    }
    Ok(())
}

/// Every field of the response again, and a mark.
async fn echo_response_head(exchange: &mut Exchange) -> Answer {
    let echoed = exchange.response_headers.clone();
    let mut fields: Vec<_> = borrowed(&echoed).collect();
    fields.push(("x-went-into-resp-headers", "true"));
    exchange.send(reply::response_headers(&fields)).await
}

/// Events one by one; anything else is withheld until it is whole.
async fn echo_response_body(exchange: &mut Exchange, body: &HttpBody) -> Answer {
    let kind = header(&exchange.response_headers, "content-type").unwrap_or_default();
    if kind.contains("text/event-stream") {
        return exchange.send(reply::response_body(body.body.clone(), body.end_of_stream)).await;
    }
    exchange.held.extend_from_slice(&body.body);
    if body.end_of_stream {
        let whole = Bytes::from(std::mem::take(&mut exchange.held));
        for message in reply::response_bodies(&whole) {
            exchange.send(message).await?;
        }
    }
    Ok(())
}

/// The request's body as an object that names a model, or the answer to one that does not.
async fn parsed(exchange: &mut Exchange) -> Result<serde_json::Map<String, Value>, End> {
    let Ok(Value::Object(fields)) = serde_json::from_slice::<Value>(&exchange.request_body) else {
        failure(exchange, 400, "BadRequest", "invalid JSON").await?;
        return Err(End::Close);
    };
    if !fields.get("model").is_some_and(Value::is_string) {
        failure(exchange, 400, "BadRequest", "model not found in request body").await?;
    }
    Ok(fields)
}

/// An error as GIE's code base tells it: an immediate response, and the end of the stream.
async fn failure(exchange: &mut Exchange, status: u16, code: &str, why: &str) -> Answer {
    exchange.send(reply::immediate(status, &[], &format!("inference error: {code} - {why}"))).await?;
    Err(End::Close)
}
