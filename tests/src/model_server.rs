//! A sample model server: OpenAI's completions API with made-up tokens, and test endpoints whose every byte, write and
//! misdeed is told by the request (see [`Plan`]). HTTP/1.1 is written by hand on plain sockets, because the tests need
//! to decide where a write ends.
//!
//! Any response says who gave it (`x-served-by: ip:port`) and which one it is on its connection (`x-request-count`).
//! A peer that closes or resets during a response is noticed at once, as uvicorn does, and counted in `aborted`.

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

pub use plan::{After, Echo, Fault, FaultKind, Framing, HeadWrites, Lengths, Pauses, Plan, Upgraded};
pub use sent::Sent;
pub(crate) use sequence::Sequence;
pub use upgraded::{Received, Upload};

#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    /// The model that `/v1/models` and `/metrics` name.
    pub model: String,
    /// Tokens of a completion that asks for no number.
    pub tokens: u32,
    /// Time between tokens of a completion that asks for no other.
    pub interval: Duration,
    /// A connection that waits this long for a request is closed without a word. Uvicorn's is five seconds.
    pub idle_close: Option<Duration>,
    /// Whether requests are kept for [`ModelServer::seen`].
    pub keep_requests: bool,
    /// Whether bytes written are hashed for `/test/sent`, which takes time for each.
    pub keep_sent: bool,
    /// `SO_SNDBUF` of its connections. The kernel doubles it, and sizes the buffer by itself if it is not given.
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

/// What the connections of one server share.
struct Shared {
    options: Options,
    addr: SocketAddr,
    accepted: AtomicU64,
    open: AtomicU64,
    requests: AtomicU64,
    aborted: AtomicU64,
    written: AtomicU64,
    uploads_broken: AtomicU64,
    running: AtomicU64,
    waiting: AtomicU64,
    kv_cache_usage: Mutex<f64>,
    healthy: AtomicBool,
    seen: Mutex<Vec<Echo>>,
    sent: Mutex<sent::Account>,
    received: Mutex<Vec<Received>>,
    /// By the ids of their streams.
    uploads: Mutex<HashMap<u64, Upload>>,
    /// Responses that wait to be told ([`FaultKind::UntilTold`]) wait no more.
    told: watch::Sender<bool>,
}

/// One more while it lives.
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

/// A running server. Dropping it ends it like a killed process: listener and connections are closed at once.
pub struct ModelServer {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    runtime: OwnRuntime,
}

impl ModelServer {
    /// Returns once the server accepts connections, on a thread of its own.
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

    /// Requests that were read as a whole.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Responses that were not finished because the peer closed or reset the connection.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.shared.aborted.load(Ordering::Relaxed)
    }

    /// Bytes of responses that the kernel has taken from the server, in whole writes.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Requests whose body ended early or whose bytes made no request.
    #[must_use]
    pub fn uploads_broken(&self) -> u64 {
        self.shared.uploads_broken.load(Ordering::Relaxed)
    }

    /// Completions being generated, as `/metrics` tells it.
    #[must_use]
    pub fn running(&self) -> u64 {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// The requests so far, in the order of their arrival.
    #[must_use]
    pub fn seen(&self) -> Vec<Echo> {
        self.shared.seen.lock().clone()
    }

    /// What came on connections that have switched protocols, once the peer had ended its side of them.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.shared.received.lock().clone()
    }

    /// What has come so far of a stream that a plan has named ([`Plan::upload`]).
    #[must_use]
    pub fn upload(&self, stream_id: u64) -> Option<Upload> {
        self.shared.uploads.lock().get(&stream_id).cloned()
    }

    /// As [`Self::upload`], and forgets it.
    pub fn take_upload(&self, stream_id: u64) -> Option<Upload> {
        self.shared.uploads.lock().remove(&stream_id)
    }

    /// What was sent in answer to the request of this `x-request-id`, if it is one of the last.
    #[must_use]
    pub fn sent(&self, id: &str) -> Option<Sent> {
        self.shared.sent.lock().find(id).cloned()
    }

    /// What `/metrics` tells as `vllm:num_requests_waiting`.
    pub fn set_waiting(&self, requests: u64) {
        self.shared.waiting.store(requests, Ordering::Relaxed);
    }

    /// What `/metrics` tells as `vllm:kv_cache_usage_perc`: 0 to 1.
    pub fn set_kv_cache_usage(&self, usage: f64) {
        *self.shared.kv_cache_usage.lock() = usage;
    }

    /// Whether `/health` answers 200 or 503.
    pub fn set_healthy(&self, healthy: bool) {
        self.shared.healthy.store(healthy, Ordering::Relaxed);
    }

    /// Responses that wait to be told ([`FaultKind::UntilTold`]) go on, and later ones do not wait.
    pub fn go_on(&self) {
        self.shared.told.send_replace(true);
    }

    /// Closes everything at once and returns when it is closed. The counters can still be read.
    pub fn stop(&mut self) {
        self.runtime.stop();
    }
}

async fn listen(options: Options) -> Result<Arc<Shared>> {
    let listener =
        TcpListener::bind(options.listen).await.with_context(|| format!("listening on {}", options.listen))?;
    if let Some(bytes) = options.send_buffer {
        // What it accepts inherits it.
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
                // Out of descriptors, most likely; there is nobody to tell.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    Ok(shared)
}
