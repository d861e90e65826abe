//! A sample model server: OpenAI's completions API with generated tokens, and test endpoints whose bytes, writes and faults the
//! request determines (see [`Plan`]). HTTP/1.1 is written directly to sockets, because tests control where a write ends.
//!
//! Every response names its server (`x-served-by: ip:port`) and its number on the connection (`x-request-count`). A peer that
//! closes or resets during a response is noticed at once, as in uvicorn, and counted in `aborted`.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::{net::TcpListener, sync::watch};

use crate::own_runtime::OwnRuntime;
use connection::Connection;

mod connection;
mod openai;
mod pacer;
mod plan;
mod planned;
mod request;
mod sent;
mod sequence;
mod upgraded;
#[cfg(test)]
mod tests;

pub(crate) use openai::word;
pub use plan::{After, Echo, Fault, FaultKind, Framing, HeadWrites, Lengths, Pauses, Plan, Upgraded};
pub use sent::Sent;
pub(crate) use sequence::Sequence;
pub use upgraded::{Received, Upload};

#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    /// The model name in `/v1/models` and `/metrics`.
    pub model: String,
    /// Default number of tokens of a completion.
    pub tokens: u32,
    /// Default time between tokens.
    pub interval: Duration,
    /// A connection without a request for this long is closed silently. Uvicorn's default is five seconds.
    pub idle_close: Option<Duration>,
    /// Whether requests are kept for [`ModelServer::seen`].
    pub keep_requests: bool,
    /// Whether written bytes are hashed for `/test/sent`, which costs time for each.
    pub keep_sent: bool,
    /// `SO_SNDBUF` of its connections. The kernel doubles it, and sizes the buffer automatically without it.
    pub send_buffer: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            model: "sample".to_owned(),
            tokens: 16,
            interval: Duration::ZERO,
            idle_close: Some(Duration::from_secs(5)),
            keep_requests: true,
            keep_sent: true,
            send_buffer: None,
        }
    }
}

/// State shared by the connections of one server.
struct Shared {
    options: Options,
    addr: SocketAddr,
    accepted: AtomicU64,
    open: AtomicU64,
    requests: AtomicU64,
    aborted: AtomicU64,
    written: AtomicU64,
    uploads_broken: AtomicU64,
    malformed: AtomicU64,
    running: AtomicU64,
    waiting: AtomicU64,
    kv_cache_usage: Mutex<f64>,
    healthy: AtomicBool,
    seen: Mutex<Vec<Echo>>,
    sent: Mutex<sent::Account>,
    received: Mutex<Vec<Received>>,
    /// By stream id.
    uploads: Mutex<HashMap<u64, Upload>>,
    /// Whether responses that wait for [`FaultKind::UntilTold`] may continue.
    told: watch::Sender<bool>,
}

/// Counts one more while it exists.
struct Gauge<'a>(&'a AtomicU64);

impl<'a> Gauge<'a> {
    fn raise(value: &'a AtomicU64) -> Self {
        value.fetch_add(1, Ordering::Relaxed);
        Self(value)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A running server. Dropping it acts like killing its process: listener and connections close at once.
pub struct ModelServer {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    runtime: OwnRuntime,
}

impl ModelServer {
    /// Returns once the server accepts connections. Runs on its own thread.
    pub async fn start(options: Options) -> Result<Self> {
        let (shared, runtime) = OwnRuntime::start("model-server", move || listen(options)).await?;
        Ok(Self { addr: shared.addr, shared, runtime })
    }

    #[must_use]
    pub fn connections_accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn connections_open(&self) -> u64 {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Requests read whole.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Responses left incomplete because the peer closed or reset the connection.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.shared.aborted.load(Ordering::Relaxed)
    }

    /// Response bytes accepted by the kernel, counted in whole writes.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Requests whose body ended early or whose bytes did not parse.
    #[must_use]
    pub fn uploads_broken(&self) -> u64 {
        self.shared.uploads_broken.load(Ordering::Relaxed)
    }

    /// Requests whose bytes did not parse.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.shared.malformed.load(Ordering::Relaxed)
    }

    /// Completions in progress, as in `/metrics`.
    #[must_use]
    pub fn running(&self) -> u64 {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// The requests so far, in order of arrival.
    #[must_use]
    pub fn seen(&self) -> Vec<Echo> {
        self.shared.seen.lock().clone()
    }

    /// What arrived on switched connections, once the peer had ended its side of them.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().clone()
    }

    /// What has arrived so far of a stream named by a plan ([`Plan::upload`]).
    #[must_use]
    pub fn upload(&self, stream_id: u64) -> Option<Upload> {
        self.shared.uploads.lock().get(&stream_id).cloned()
    }

    /// Like [`Self::upload`]; also forgets the stream.
    pub fn take_upload(&self, stream_id: u64) -> Option<Upload> {
        self.shared.uploads.lock().remove(&stream_id)
    }

    /// What was sent in response to the request with this `x-request-id`, if it is recent.
    #[must_use]
    pub fn sent(&self, id: &str) -> Option<Sent> {
        self.shared.sent.lock().find(id).cloned()
    }

    /// The value of `vllm:num_requests_waiting` in `/metrics`.
    pub fn set_waiting(&self, requests: u64) {
        self.shared.waiting.store(requests, Ordering::Relaxed);
    }

    /// The value of `vllm:kv_cache_usage_perc` in `/metrics`: 0 to 1.
    pub fn set_kv_cache_usage(&self, usage: f64) {
        *self.shared.kv_cache_usage.lock() = usage;
    }

    /// Whether `/health` answers 200 or 503.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::Relaxed);
    }

    /// Continues the responses that wait for [`FaultKind::UntilTold`]; later ones do not wait.
    pub fn resume(&self) {
        self.shared.told.send_replace(true);
    }

    /// Closes everything at once and returns afterwards. The counters remain readable.
    pub fn stop(&mut self) {
        self.runtime.stop();
    }
}

async fn listen(options: Options) -> Result<Arc<Shared>> {
    let listener =
        TcpListener::bind(options.listen).await.with_context(|| format!("listening on {}", options.listen))?;
    if let Some(bytes) = options.send_buffer {
        // Accepted sockets inherit it.
        socket2::SockRef::from(&listener).set_send_buffer_size(bytes)?;
    }
    let shared = Arc::new(Shared {
        addr: listener.local_addr()?,
        options,
        accepted: AtomicU64::default(),
        open: AtomicU64::default(),
        requests: AtomicU64::default(),
        aborted: AtomicU64::default(),
        written: AtomicU64::default(),
        uploads_broken: AtomicU64::default(),
        malformed: AtomicU64::default(),
        running: AtomicU64::default(),
        waiting: AtomicU64::default(),
        kv_cache_usage: Mutex::default(),
        healthy: AtomicBool::new(true),
        seen: Mutex::default(),
        sent: Mutex::default(),
        received: Mutex::default(),
        uploads: Mutex::default(),
        told: watch::Sender::default(),
    });
    let server = Arc::clone(&shared);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    server.accepted.fetch_add(1, Ordering::Relaxed);
                    let server = Arc::clone(&server);
                    tokio::spawn(async move {
                        let _open = Gauge::raise(&server.open);
                        Connection::new(stream, &server).serve().await;
                    });
                }
                // Probably out of descriptors; retry.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    Ok(shared)
}
