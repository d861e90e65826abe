//! Spans of requests, for an OpenTelemetry collector.
//!
//! Each request whose head could be read has a server span, and its pick a child of that. The server span's context goes to
//! the picker and, unless the picker sets another, to the endpoint. A worker makes spans and puts ended ones into a bounded
//! queue; a thread of its own sends them. Where tracing is off, none of this exists.

mod export;
mod span;

pub use export::Exporter;
pub use span::{Ended, Pick, RequestSpan};

use std::sync::Arc;

use anyhow::Context as _;
use opentelemetry::{InstrumentationScope, KeyValue, trace::TracerProvider as _};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider},
};

use crate::{config, metrics::Metrics, panics::Watch};

/// Makes spans. Clones make them for the same exporter.
#[derive(Clone)]
pub struct Telemetry {
    tracer: SdkTracer,
}

impl Telemetry {
    /// `None` where it is off. Dropping the exporter sends what is left, for a moment.
    pub fn start(
        config: &config::Tracing,
        metrics: &Arc<Metrics>,
        watch: &Watch,
    ) -> anyhow::Result<Option<(Self, Exporter)>> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
        let (queue, exporter) = export::start(endpoint, config, &resource(config), Arc::clone(metrics), watch)
            .with_context(|| format!("the exporter of spans to {endpoint}"))?;
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sampling_ratio.get())));
        let provider = SdkTracerProvider::builder().with_sampler(sampler).with_span_processor(queue).build();
        let scope = InstrumentationScope::builder("penstock").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Some((Self { tracer: provider.tracer_with_scope(scope) }, exporter)))
    }
}

/// What the spans are about: this agent, and whatever `OTEL_RESOURCE_ATTRIBUTES` says.
fn resource(config: &config::Tracing) -> Resource {
    Resource::builder()
        .with_service_name(config.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}
