//! Spans of requests, exported to an OpenTelemetry collector.
//!
//! Each request with a valid head has a server span, and its pick has a child span. The server span's context goes to
//! the picker and, unless the picker sets another, to the endpoint. Workers put ended spans into a bounded queue; a
//! separate thread exports them. Nothing of this exists if tracing is off.

mod export;
mod span;

pub use export::Exporter;
pub use span::{EndedRequest, PickResult, RequestSpan};

use std::sync::Arc;

use anyhow::Context as _;
use opentelemetry::{InstrumentationScope, KeyValue, trace::TracerProvider as _};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider},
};

use crate::{config, metrics::Metrics, panics::PanicWatch};

/// Creates spans. Clones use the same exporter.
#[derive(Clone)]
pub struct Telemetry {
    tracer: SdkTracer,
}

impl Telemetry {
    /// Starts the exporter; `None` if tracing is off. Dropping the exporter sends the remaining spans, for up to a
    /// second.
    pub fn start(
        config: &config::Tracing,
        metrics: &Arc<Metrics>,
        watch: &PanicWatch,
    ) -> anyhow::Result<Option<(Self, Exporter)>> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
        let (queue, exporter) = export::start(endpoint, config, &resource(config), Arc::clone(metrics), watch)
            .with_context(|| format!("cannot start the span exporter for {endpoint}"))?;
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.sampling_ratio.get())));
        let provider = SdkTracerProvider::builder().with_sampler(sampler).with_span_processor(queue).build();
        let scope = InstrumentationScope::builder("penstock").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Some((Self { tracer: provider.tracer_with_scope(scope) }, exporter)))
    }
}

/// Describes this agent, with the attributes of `OTEL_RESOURCE_ATTRIBUTES`.
fn resource(config: &config::Tracing) -> Resource {
    Resource::builder()
        .with_service_name(config.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}
