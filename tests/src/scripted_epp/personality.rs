//! Real pickers as far as their peer can distinguish them: GIE v1.5, llm-d's router, the light one of conformance tests, and
//! Dynamo, which validates strictly. All pick by the same simple rule.
//!
//! [`Personality`] has what a test needs to run one scenario against each of them.

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

/// The picker for tests of other subjects.
pub type Production = LlmdRouter;

/// What a picker does with a request without an available endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It sends an immediate reply with this status.
    Immediate(u16),
    /// It fails, and the pool's failure mode decides.
    Fails,
}

pub trait Personality: Script + Sized {
    fn over(endpoints: Endpoints) -> Self;

    /// Sets these fields on every request.
    #[must_use]
    fn adding(self, fields: &[(&str, &str)]) -> Self;

    /// Puts this model into every request body; a picker that never changes bodies ignores it.
    #[must_use]
    fn rewriting(self, model: &str) -> Self;

    /// The body that the endpoint gets for a client's JSON body.
    fn sent_on(body: &[u8], rewritten: Option<&str>) -> Vec<u8>;

    /// The field that it sets on a response from `served`, and its value.
    fn mark(served: SocketAddr) -> (&'static str, String);

    /// What it does without an endpoint to pick, for a request with or without a body.
    fn refusal(has_body: bool) -> Refusal;
}

/// Round robin over the endpoints in the subset. A test changes `offer` to get a list.
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

    /// Names this many endpoints, in order of preference.
    #[must_use]
    pub fn offering(self, offer: usize) -> Self {
        Self { offer, ..self }
    }

    /// The endpoints in a list of `ip:port`, or of `ip` for all its ports.
    fn named(&self, list: &str) -> Vec<String> {
        let names = |entry: &str, one: &str| entry == one || one.rsplit_once(':').is_some_and(|(ip, _)| ip == entry);
        let named = |one: &&String| list.split(',').any(|entry| names(entry.trim(), one));
        self.endpoints.iter().filter(named).cloned().collect()
    }

    /// `ip:port`, or several with commas; `None` without an endpoint to pick.
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

/// The health service names in GIE's code base.
const SERVICES: [&str; 3] = ["liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"];

/// Serving under these names; unknown under others.
fn known_as(services: &[&str], service: &str) -> Result<ServingStatus, Status> {
    Ok(if services.contains(&service) { ServingStatus::Serving } else { ServingStatus::ServiceUnknown })
}

/// Fields that a test makes a picker set.
type Fields = Vec<(String, String)>;

fn owned(fields: &[(&str, &str)]) -> Fields {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn borrowed(fields: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> {
    fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// Picks and replies like GIE's code base: the pick, the body's length, the test's fields, and an echo of every request field as
/// Go's map leaves it (the last value of a repeated one); then the whole body.
async fn echo(endpoints: &Endpoints, added: &Fields, exchange: &mut Exchange, body: Option<&Bytes>) -> Answer {
    // Of the last message: earlier ones are forgotten.
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

/// Echoes every response field and adds a mark.
async fn echo_response_head(exchange: &mut Exchange) -> Answer {
    let echoed = exchange.response_headers.clone();
    let mut fields: Vec<_> = borrowed(&echoed).collect();
    fields.push(("x-went-into-resp-headers", "true"));
    exchange.send(reply::response_headers(&fields)).await
}

/// Events one by one; other content is withheld until complete.
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

/// The request body as an object with a model, or the error reply without one.
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

/// An error in the style of GIE's code base: an immediate reply, then the end of the stream.
async fn failure(exchange: &mut Exchange, status: u16, code: &str, why: &str) -> Answer {
    exchange.send(reply::immediate(status, &[], &format!("inference error: {code} - {why}"))).await?;
    Err(End::Close)
}
