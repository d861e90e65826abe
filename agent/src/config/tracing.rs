//! `[tracing]`: spans to an OpenTelemetry collector.

use super::{Tracing, document::Section, value};

pub(super) fn tracing(section: &mut Section<'_>) -> Tracing {
    let default = Tracing::default();
    Tracing {
        otlp_endpoint: section.read("otlp_endpoint", value::http_url_or_off).unwrap_or(default.otlp_endpoint),
        sampling_ratio: section.read("sampling_ratio", value::ratio).unwrap_or(default.sampling_ratio),
        service_name: section.read("service_name", value::non_empty).unwrap_or(default.service_name),
        queue_spans: section.read("queue_spans", value::integer(1..=1 << 20)).unwrap_or(default.queue_spans),
        export_interval: section.read("export_interval", value::duration).unwrap_or(default.export_interval),
    }
}
