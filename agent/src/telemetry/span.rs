//! The span of one request, with attribute names from OpenTelemetry's conventions for HTTP servers and generative AI;
//! other attributes are named `penstock.…`.
//!
//! Times follow the monotonic clock from the start of the request, so that a step of the wall clock cannot reverse
//! them. A dropped span ends when it is dropped.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, Version, header, request};
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{
        Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
        Tracer as _,
    },
};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use tokio::time::Instant;

use super::Telemetry;
use crate::{
    http::{
        headers::Arrival,
        trace_context::{self, TraceParent},
    },
    picker::metadata::Collected,
    text::{self, cut},
};

pub struct RequestSpan {
    span: Span,
    tracer: SdkTracer,
    began: (SystemTime, Instant),
}

/// The result of a pick.
pub struct PickResult<'p> {
    /// `epp`, `builtin`, or `fail_open` if the built-in picker replaced a failed EPP.
    pub by: &'static str,
    pub epp: Option<&'p str>,
    /// In the order in which they are tried.
    pub endpoints: &'p [SocketAddr],
    /// Why the pick failed.
    pub error: Option<&'static str>,
}

/// The result of a request.
pub struct EndedRequest<'e> {
    /// From the start of the request to the end of the response.
    pub took: Duration,
    pub status: u16,
    pub reason: &'static str,
    /// The EPP's own reason.
    pub detail: Option<&'e str>,
    /// Whether the agent answered with its own error.
    pub refused: bool,
    /// Whether the response began and was aborted.
    pub broken: bool,
    pub pool: &'e str,
    pub endpoint: Option<SocketAddr>,
    pub model: Option<&'e str>,
    pub carried_by: &'static str,
    pub carried_why: &'static str,
    /// From the start of the request to the first byte of the response body.
    pub first_byte: Option<Duration>,
    /// The metadata of the EPP's replies.
    pub metadata: Option<&'e Collected>,
}

impl Telemetry {
    /// Starts the span of a request, as a child of the `caller`'s span if there is one, and makes it the parent of the
    /// next hops' spans. The headers must have been prepared by [`crate::http::headers::prepare_request`].
    pub fn request(
        &self,
        parts: &mut request::Parts,
        arrival: &Arrival,
        caller: Option<(TraceParent, TraceState)>,
        began: Instant,
    ) -> RequestSpan {
        let began = (SystemTime::now() - began.elapsed(), began);
        let parent = caller.map_or_else(Context::new, |(parent, state)| {
            let flags = if parent.sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
            let (trace, span) = (TraceId::from_bytes(parent.trace_id), SpanId::from_bytes(parent.span_id));
            Context::new().with_remote_span_context(SpanContext::new(trace, span, flags, true, state))
        });
        let builder = self.tracer.span_builder(cut(parts.method.as_str(), text::NAME).into_owned());
        let mut span =
            builder.with_kind(SpanKind::Server).with_start_time(began.0).start_with_context(&self.tracer, &parent);
        if span.is_recording() {
            span.set_attributes(attributes(parts, arrival));
        }
        let context = span.span_context();
        if context.is_valid() {
            let (trace_id, span_id) = (context.trace_id().to_bytes(), context.span_id().to_bytes());
            let sampled = context.is_sampled();
            trace_context::send(&mut parts.headers, TraceParent { trace_id, span_id, sampled });
        }
        RequestSpan { span, tracer: self.tracer.clone(), began }
    }
}

fn attributes(parts: &request::Parts, arrival: &Arrival) -> Vec<KeyValue> {
    let host = field(&parts.headers, &header::HOST).and_then(|host| host.parse::<http::uri::Authority>().ok());
    let version = match arrival.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    let address: IpAddr = arrival.client.to_canonical();
    let mut all = vec![
        KeyValue::new("http.request.method", cut(parts.method.as_str(), text::NAME).into_owned()),
        KeyValue::new("url.path", cut(parts.uri.path(), text::PHRASE).into_owned()),
        KeyValue::new("url.scheme", if arrival.tls { "https" } else { "http" }),
        KeyValue::new("network.protocol.version", version),
        KeyValue::new("client.address", address.to_string()),
    ];
    if let Some(host) = host {
        all.push(KeyValue::new("server.address", cut(host.host(), text::NAME).into_owned()));
        all.extend(host.port_u16().map(|port| KeyValue::new("server.port", i64::from(port))));
    }
    let mut add = |key: &'static str, name: header::HeaderName| {
        all.extend(field(&parts.headers, &name).map(|value| KeyValue::new(key, cut(value, text::NAME).into_owned())));
    };
    add("user_agent.original", header::USER_AGENT);
    add("penstock.request_id", crate::http::headers::X_REQUEST_ID);
    all.extend(operation(parts.uri.path()).map(|operation| KeyValue::new("gen_ai.operation.name", operation)));
    all
}

fn field<'h>(headers: &'h HeaderMap, name: &header::HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty())
}

/// `gen_ai.operation.name` of OpenAI's paths.
fn operation(path: &str) -> Option<&'static str> {
    match path.trim_end_matches('/').strip_prefix("/v1/")? {
        "chat/completions" => Some("chat"),
        "completions" => Some("text_completion"),
        "embeddings" => Some("embeddings"),
        _ => None,
    }
}

impl RequestSpan {
    fn at(&self, time: Instant) -> SystemTime {
        self.began.0 + time.saturating_duration_since(self.began.1)
    }

    /// Records a finished pick that began at `began`.
    pub fn pick(&self, began: Instant, pick: &PickResult<'_>) {
        if !self.span.is_recording() {
            return;
        }
        let parent = Context::new().with_remote_span_context(self.span.span_context().clone());
        let kind = if pick.epp.is_some() { SpanKind::Client } else { SpanKind::Internal };
        let builder = self.tracer.span_builder("pick").with_kind(kind).with_start_time(self.at(began));
        let mut span = builder.start_with_context(&self.tracer, &parent);
        span.set_attribute(KeyValue::new("penstock.picked_by", pick.by));
        if let Some((host, port)) = pick.epp.and_then(|epp| epp.rsplit_once(':')) {
            span.set_attribute(KeyValue::new("rpc.system", "grpc"));
            span.set_attribute(KeyValue::new("server.address", host.to_owned()));
            span.set_attributes(port.parse::<i64>().ok().map(|port| KeyValue::new("server.port", port)));
        }
        if !pick.endpoints.is_empty() {
            let list: Vec<String> = pick.endpoints.iter().map(ToString::to_string).collect();
            span.set_attribute(KeyValue::new("penstock.endpoints", cut(&list.join(","), text::PHRASE).into_owned()));
        }
        if let Some(error) = pick.error {
            span.set_attribute(KeyValue::new("error.type", error));
            span.set_status(Status::error(error));
        }
        span.end_with_timestamp(self.at(Instant::now()));
    }

    pub fn end(mut self, ended: &EndedRequest<'_>) {
        if !self.span.is_recording() {
            return;
        }
        let text = |name: &'static str, value: &str| KeyValue::new(name, cut(value, text::NAME).into_owned());
        let mut all = vec![
            KeyValue::new("http.response.status_code", i64::from(ended.status)),
            KeyValue::new("penstock.reason", ended.reason),
        ];
        all.extend(Some(ended.pool).filter(|pool| !pool.is_empty()).map(|pool| text("penstock.pool", pool)));
        all.extend(ended.endpoint.map(|endpoint| text("penstock.endpoint", &endpoint.to_string())));
        all.extend(ended.detail.map(|detail| text("penstock.reason_detail", detail)));
        for (namespace, key, value) in ended.metadata.into_iter().flat_map(Collected::values) {
            all.push(KeyValue::new(format!("penstock.metadata.{namespace}.{key}"), as_value(value)));
        }
        all.extend(ended.model.map(|model| text("gen_ai.request.model", model)));
        if ended.carried_by != "none" {
            all.push(KeyValue::new("penstock.carried_by", ended.carried_by));
            all.push(KeyValue::new("penstock.carried_why", ended.carried_why));
        }
        // By the conventions for servers, a client's error is not a failure of the span.
        if ended.refused || ended.broken {
            all.push(KeyValue::new("error.type", ended.reason));
        } else if ended.status >= 500 {
            all.push(KeyValue::new("error.type", ended.status.to_string()));
        }
        if ended.broken || ended.status >= 500 {
            self.span.set_status(Status::error(ended.reason));
        }
        self.span.set_attributes(all);
        if let Some(after) = ended.first_byte {
            let seconds = KeyValue::new("gen_ai.server.time_to_first_token", after.as_secs_f64());
            self.span.add_event_with_timestamp("first_token", self.began.0 + after, vec![seconds]);
        }
        self.span.end_with_timestamp(self.began.0 + ended.took);
    }
}

/// A number, a truth value or a text; of others the JSON.
fn as_value(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Bool(truth) => (*truth).into(),
        Json::String(text) => text.clone().into(),
        Json::Number(number) => number.as_f64().unwrap_or_default().into(),
        Json::Null | Json::Array(_) | Json::Object(_) => value.to_string().into(),
    }
}
