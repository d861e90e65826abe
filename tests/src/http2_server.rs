//! An HTTP/2 endpoint without TLS. It answers like the model server by the request's [`Plan`](crate::Plan) and `/test/echo`, and as
//! gRPC for gRPC requests (see `grpc`).
//!
//! DATA frames replace chunks: a body is sent in frames of the plan's `chunks`. A stream reset by the peer is noticed at once and
//! counted in `aborted`.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::model_server::Echo;
use crate::own_runtime::OwnRuntime;

pub mod grpc;
mod stream;
#[cfg(test)]
mod tests;

#[derive(Clone, Debug)]
pub struct Http2Options {
    pub listen: SocketAddr,
    /// Concurrent streams per connection; more are refused.
    pub max_streams: u32,
    /// The first requests, this many, are refused as unprocessed (`REFUSED_STREAM`).
    pub refuses: u64,
    /// The window of a stream and of a connection.
    pub window: u32,
}

impl Default for Http2Options {
    fn default() -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), max_streams: 256, refuses: 0, window: 1 << 20 }
    }
}

/// State shared by the connections of one server.
struct Shared {
    options: Http2Options,
    addr: SocketAddr,
    accepted: AtomicU64,
    open: AtomicU64,
    requests: AtomicU64,
    refused: AtomicU64,
    aborted: AtomicU64,
    uploads_broken: AtomicU64,
    streams: AtomicU64,
    most_streams: AtomicU64,
    written: AtomicU64,
    seen: Mutex<Vec<Echo>>,
    /// Incremented to make connections send GOAWAY.
    leaving: watch::Sender<u64>,
    /// Whether responses that wait for [`FaultKind::UntilTold`](crate::model_server::FaultKind::UntilTold) may continue.
    told: watch::Sender<bool>,
}

/// A running server. Dropping it acts like killing its process.
pub struct Http2Server {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    runtime: OwnRuntime,
}

impl Http2Server {
    /// Returns once the server accepts connections. Runs on its own thread.
    pub async fn start(options: Http2Options) -> Result<Self> {
        let (shared, runtime) = OwnRuntime::start("http2-server", move || listen(options)).await?;
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

    /// Requests that were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Responses left incomplete because the peer reset the stream or is gone.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.shared.aborted.load(Ordering::Relaxed)
    }

    /// Requests whose body ended early.
    #[must_use]
    pub fn uploads_broken(&self) -> u64 {
        self.shared.uploads_broken.load(Ordering::Relaxed)
    }

    /// The highest number of concurrent streams over all connections.
    #[must_use]
    pub fn most_streams(&self) -> u64 {
        self.shared.most_streams.load(Ordering::Relaxed)
    }

    /// Bytes of bodies sent within the peer's windows.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// The requests so far, in order of arrival.
    #[must_use]
    pub fn seen(&self) -> Vec<Echo> {
        self.shared.seen.lock().clone()
    }

    /// Sends `GOAWAY` on every connection; running streams may finish.
    pub fn leave(&self) {
        self.shared.leaving.send_modify(|times| *times += 1);
    }

    /// Continues the responses that wait for [`FaultKind::UntilTold`](crate::model_server::FaultKind::UntilTold); later ones do
    /// not wait.
    pub fn resume(&self) {
        self.shared.told.send_replace(true);
    }

    /// Restores the initial state: such responses wait for [`Self::resume`].
    pub fn hold(&self) {
        self.shared.told.send_replace(false);
    }

    /// Closes everything at once and returns afterwards. The counters remain readable.
    pub fn stop(&mut self) {
        self.runtime.stop();
    }
}

async fn listen(options: Http2Options) -> Result<Arc<Shared>> {
    let listener =
        TcpListener::bind(options.listen).await.with_context(|| format!("listening on {}", options.listen))?;
    let shared = Arc::new(Shared {
        addr: listener.local_addr()?,
        options,
        accepted: AtomicU64::default(),
        open: AtomicU64::default(),
        requests: AtomicU64::default(),
        refused: AtomicU64::default(),
        aborted: AtomicU64::default(),
        uploads_broken: AtomicU64::default(),
        streams: AtomicU64::default(),
        most_streams: AtomicU64::default(),
        written: AtomicU64::default(),
        seen: Mutex::default(),
        leaving: watch::Sender::new(0),
        told: watch::Sender::default(),
    });
    let server = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            server.accepted.fetch_add(1, Ordering::Relaxed);
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                server.open.fetch_add(1, Ordering::Relaxed);
                // An error concerns the peer, which has been notified.
                let _ = connection(tcp, &server).await;
                server.open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(shared)
}

/// Serves one connection to its end.
async fn connection(tcp: TcpStream, shared: &Arc<Shared>) -> Result<()> {
    let _ = tcp.set_nodelay(true);
    let (tcp, kept) = kept(tcp)?;
    let options = &shared.options;
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(options.max_streams)
        .initial_window_size(options.window)
        .initial_connection_window_size(options.window)
        .data_frame_budget(1 << 30);
    let mut connection = builder.handshake(tcp).await?;
    let mut leaving = shared.leaving.subscribe();
    let (close, mut closed) = watch::channel(false);
    let mut count = 0;
    loop {
        let accepted = tokio::select! {
            biased;
            // The plan ends the connection, without further frames.
            _ = closed.wait_for(|close| *close) => return Ok(()),
            Ok(()) = leaving.changed() => {
                connection.graceful_shutdown();
                continue;
            }
            accepted = connection.accept() => accepted,
        };
        let Some(accepted) = accepted else {
            // Closing before the peer, with unread frames from it, would discard data in flight.
            drop(connection);
            read_out(kept).await?;
            return Ok(());
        };
        let (request, mut respond) = accepted?;
        if shared.refused.load(Ordering::Relaxed) < options.refuses {
            shared.refused.fetch_add(1, Ordering::Relaxed);
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            continue;
        }
        count += 1;
        tokio::spawn(stream::serve(Arc::clone(shared), request, respond, count, close.clone()));
    }
}

/// Returns the connection and a second handle to it.
fn kept(tcp: TcpStream) -> std::io::Result<(TcpStream, std::net::TcpStream)> {
    let tcp = tcp.into_std()?;
    let kept = tcp.try_clone()?;
    Ok((TcpStream::from_std(tcp)?, kept))
}

/// Waits for the peer to close the connection.
async fn read_out(tcp: std::net::TcpStream) -> std::io::Result<()> {
    let mut tcp = TcpStream::from_std(tcp)?;
    tokio::io::copy(&mut tcp, &mut tokio::io::sink()).await?;
    Ok(())
}
