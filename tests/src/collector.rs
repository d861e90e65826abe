//! An OpenTelemetry collector that keeps spans, refuses them, or never answers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::own_runtime::OwnRuntime;

/// How it treats messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectorBehaviour {
    Keeps,
    Refuses,
    /// Never answers.
    Holds,
}

/// A received span: ids in hexadecimal, times in nanoseconds since 1970, values as text.
#[derive(Clone, Debug)]
pub struct CollectedSpan {
    pub trace: String,
    pub id: String,
    /// Empty without a parent.
    pub parent: String,
    pub state: String,
    pub name: String,
    pub kind: SpanKind,
    pub begin: u64,
    pub end: u64,
    pub attributes: BTreeMap<String, String>,
    /// Name, time and attributes of each event.
    pub events: Vec<(String, u64, BTreeMap<String, String>)>,
    pub failed: bool,
    /// The sender's resource attributes.
    pub resource: BTreeMap<String, String>,
}

impl CollectedSpan {
    fn new(span: Span, resource: &BTreeMap<String, String>) -> Self {
        Self {
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            kind: span.kind(),
            state: span.trace_state,
            name: span.name,
            begin: span.start_time_unix_nano,
            end: span.end_time_unix_nano,
            attributes: texts(&span.attributes),
            events: span.events.iter().map(|e| (e.name.clone(), e.time_unix_nano, texts(&e.attributes))).collect(),
            failed: span.status.is_some_and(|status| status.code() == StatusCode::Error),
            resource: resource.clone(),
        }
    }

    /// An attribute; empty if missing.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(flag)) => flag.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

#[derive(Default)]
struct Record {
    spans: Mutex<Vec<CollectedSpan>>,
    messages: AtomicU64,
}

/// A running collector.
pub struct Collector {
    pub addr: SocketAddr,
    record: Arc<Record>,
    _runtime: OwnRuntime,
}

impl Collector {
    pub async fn start(mood: CollectorBehaviour) -> Result<Self> {
        let record = Arc::<Record>::default();
        let server = Server { mood, record: Arc::clone(&record) };
        let begin = move || async move {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let addr = listener.local_addr()?;
            let service = tonic::transport::Server::builder().add_service(TraceServiceServer::new(server));
            tokio::spawn(service.serve_with_incoming(TcpListenerStream::new(listener)));
            Ok(addr)
        };
        let (addr, runtime) = OwnRuntime::start("collector", begin).await?;
        Ok(Self { addr, record, _runtime: runtime })
    }

    /// Its OTLP endpoint over gRPC.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The kept spans, in order of arrival.
    #[must_use]
    pub fn spans(&self) -> Vec<CollectedSpan> {
        self.record.spans.lock().clone()
    }

    /// Messages received, however they were treated.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.record.messages.load(Ordering::Relaxed)
    }
}

struct Server {
    mood: CollectorBehaviour,
    record: Arc<Record>,
}

#[tonic::async_trait]
impl TraceService for Server {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.record.messages.fetch_add(1, Ordering::Relaxed);
        match self.mood {
            CollectorBehaviour::Keeps => {}
            CollectorBehaviour::Refuses => return Err(Status::invalid_argument("refused")),
            CollectorBehaviour::Holds => std::future::pending().await,
        }
        let mut spans = self.record.spans.lock();
        for resource in request.into_inner().resource_spans {
            let about = texts(&resource.resource.map(|resource| resource.attributes).unwrap_or_default());
            let all = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(all.map(|span| CollectedSpan::new(span, &about)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
