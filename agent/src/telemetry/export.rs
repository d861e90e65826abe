//! Exports ended spans to the collector, through a bounded queue that never blocks and a thread with its own runtime.
//!
//! Spans that do not fit into the queue or that the collector does not accept are dropped and counted. The SDK's own
//! batch processor does not count them, and its thread has no runtime for gRPC.

use std::{cell::Cell, sync::Arc, thread::JoinHandle, time::Duration};

use opentelemetry::Context;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Span, SpanData, SpanExporter as _, SpanProcessor},
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_util::sync::CancellationToken;

use crate::{config, metrics::Metrics, panics::PanicWatch};

const THREAD: &str = "penstock-spans";

/// Maximum number of spans per message.
const BATCH: usize = 512;
/// Time limit for one message, including retries.
const EXPORT: Duration = Duration::from_secs(10);
/// How long the end of the agent waits for the last spans to be sent.
const FLUSH: Duration = Duration::from_secs(1);

/// The sending side of the queue.
#[derive(Debug)]
pub(super) struct SpanQueue {
    spans: mpsc::Sender<SpanData>,
    metrics: Arc<Metrics>,
}

impl SpanProcessor for SpanQueue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        match self.spans.try_send(span) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.metrics.trace_spans_dropped("queue_full", 1),
            Err(TrySendError::Closed(_)) => self.metrics.trace_spans_dropped("stopped", 1),
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    /// The queue ends with its [`Exporter`].
    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The exporting thread. Dropping it sends the queued spans, for at most `FLUSH`, and stops the thread.
pub struct Exporter {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been logged already.
            let _ = thread.join();
        }
    }
}

/// Starts the exporter. It connects with the first message and reconnects when the connection is lost.
pub(super) fn start(
    endpoint: &str,
    config: &config::Tracing,
    resource: &Resource,
    metrics: Arc<Metrics>,
    watch: &PanicWatch,
) -> anyhow::Result<(SpanQueue, Exporter)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut exporter = {
        let _guard = runtime.enter();
        SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT).build()?
    };
    exporter.set_resource(resource);
    let (spans, queue) = mpsc::channel(config.queue_spans);
    let stop = CancellationToken::new();
    let sender = Sender { exporter, metrics: Arc::clone(&metrics), unsent: Cell::new(0), failing: Cell::new(false) };
    let (interval, stopped) = (config.export_interval, stop.clone());
    let watch = watch.clone();
    let work = move || runtime.block_on(sender.run(queue, interval, stopped));
    let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work))?;
    Ok((SpanQueue { spans, metrics }, Exporter { stop, thread: Some(thread) }))
}

struct Sender {
    exporter: SpanExporter,
    metrics: Arc<Metrics>,
    /// Spans taken from the queue and neither exported nor dropped yet.
    unsent: Cell<usize>,
    /// Whether the last message failed, which has been logged.
    failing: Cell<bool>,
}

impl Sender {
    async fn run(self, mut queue: mpsc::Receiver<SpanData>, interval: Duration, stop: CancellationToken) {
        let all = async {
            let mut batch = Vec::new();
            while gather(&mut queue, &mut batch, interval, &stop).await {
                self.unsent.set(batch.len());
                self.send(std::mem::take(&mut batch)).await;
                self.unsent.set(0);
            }
        };
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(FLUSH).await;
        };
        tokio::select! {
            () = all => {}
            () = late => {}
        }
        let left = self.unsent.get() + queue.len();
        if left > 0 {
            self.metrics.trace_spans_dropped("stopped", left as u64);
        }
    }

    async fn send(&self, batch: Vec<SpanData>) {
        let spans = batch.len() as u64;
        match self.exporter.export(batch).await {
            Ok(()) => {
                self.metrics.trace_spans_exported(spans);
                if self.failing.replace(false) {
                    tracing::info!("span export recovered");
                }
            }
            Err(error) => {
                self.metrics.trace_spans_dropped("export_failed", spans);
                if !self.failing.replace(true) {
                    tracing::warn!(%error, "span export failed, dropping spans");
                }
            }
        }
    }
}

/// Waits for a span and then up to `interval` for more. Returns false if the queue is closed and empty. Cancel-safe.
async fn gather(
    queue: &mut mpsc::Receiver<SpanData>,
    batch: &mut Vec<SpanData>,
    interval: Duration,
    stop: &CancellationToken,
) -> bool {
    tokio::select! {
        biased;
        taken = queue.recv_many(batch, BATCH) => if taken == 0 { return false },
        () = stop.cancelled() => {
            queue.close();
            return queue.recv_many(batch, BATCH).await > 0;
        }
    }
    let enough = tokio::time::sleep(interval);
    tokio::pin!(enough);
    while batch.len() < BATCH {
        let room = BATCH - batch.len();
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = &mut enough => break,
            taken = queue.recv_many(batch, room) => if taken == 0 { break },
        }
    }
    true
}
