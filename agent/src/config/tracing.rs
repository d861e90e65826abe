//! `[tracing]`: export of spans to an OpenTelemetry collector.

use std::time::Duration;

use http::uri::Authority;
use serde_json::json;
use toml::de::DeValue;

use super::{
    settings::settings,
    value::{self, Value, duration, integer},
};

settings! {
    /// Export of spans to an OpenTelemetry collector. The trace context is forwarded even if this is off.
    pub struct Tracing {
        /// URL of the collector, for OTLP over gRPC without TLS.
        pub otlp_endpoint: Option<String> = None => http_url().or_off(),
        /// Ratio of the traces started by this agent that are exported, from 0 to 1. For other traces, the caller's sampled flag
        /// decides.
        pub sampling_ratio: Ratio = Ratio::ALL => ratio(),
        /// `service.name` of the spans.
        pub service_name: String = "penstock".to_owned() => value::non_empty(),
        /// Maximum number of spans that wait for the collector. Further spans are dropped and counted.
        pub queue_spans: usize = 4096 => integer(1..=1 << 20),
        /// How long spans are collected before they are sent.
        pub export_interval: Duration = Duration::from_secs(1) => duration(),
    }
}

/// From 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio(f64);

// A ratio is never NaN.
impl Eq for Ratio {}

impl Ratio {
    /// 1: everything.
    pub const ALL: Self = Self(1.0);

    /// Returns `None` outside of 0 to 1.
    pub fn new(ratio: f64) -> Option<Self> {
        (0.0..=1.0).contains(&ratio).then_some(Self(ratio))
    }

    /// From 0 to 1.
    pub(crate) fn get(self) -> f64 {
        self.0
    }
}

/// `http://host:port`, without TLS: the collector is on this node or close to it.
fn http_url() -> Value<String> {
    value::string(r#"a URL such as "http://127.0.0.1:4317""#, |url| {
        let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')).unwrap_or_default();
        let is_host = |authority: &Authority| !authority.host().is_empty() && !authority.as_str().contains('@');
        authority.parse().is_ok_and(|authority| is_host(&authority))
    })
}

fn ratio() -> Value<Ratio> {
    let parse = |value: &DeValue<'_>| {
        let number: f64 = match value {
            DeValue::Float(number) => number.as_str().parse().ok()?,
            DeValue::Integer(number) => number.as_str().parse().ok()?,
            _ => return None,
        };
        Ratio::new(number)
    };
    let schema = json!({ "type": "number", "minimum": 0, "maximum": 1 });
    Value::new("a number from 0 to 1", schema, parse, |ratio| ratio.get().into())
}
