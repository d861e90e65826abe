//! A sample endpoint that speaks HTTP/2 without TLS. It answers as the model server does where it can: by the request's
//! [`Plan`](crate::Plan), by `/test/echo`, and in the manners of gRPC where the request is one (see `grpc`).
//!
//! Frames take the place of chunks: a body goes in DATA frames of the plan's `chunks`. A peer that resets a stream is noticed
//! at once and counted in `aborted`.

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
    /// Streams at once on a connection; what is beyond is refused.
    pub max_streams: u32,
    /// This many requests are refused as not processed (`REFUSED_STREAM`), the first ones.
    pub refuses: u64,
    /// Of a stream and of a connection.
    pub window: u32,
}

impl Default for Http2Options {
    fn default() -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), max_streams: 256, refuses: 0, window: 1 << 20 }
    }
}

/// What the connections of one server share.
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
    /// Counts the times that connections were told to go.
    leaving: watch::Sender<u64>,
}

/// A running server. Dropping it ends it like a killed process.
pub struct Http2Server {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    runtime: OwnRuntime,
}

impl Http2Server {
    /// Returns once the server accepts connections, on a thread of its own.
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

    /// Requests that were read as a whole.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Requests that were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// Responses that were not finished because the peer reset the stream, or is gone.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.shared.aborted.load(Ordering::Relaxed)
    }

    /// Requests whose body ended early.
    #[must_use]
    pub fn uploads_broken(&self) -> u64 {
        self.shared.uploads_broken.load(Ordering::Relaxed)
    }

    /// The most streams that were open at once, over all connections.
    #[must_use]
    pub fn most_streams(&self) -> u64 {
        self.shared.most_streams.load(Ordering::Relaxed)
    }

    /// Bytes of bodies for which the peer's windows had room.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// The requests so far, in the order of their arrival.
    #[must_use]
    pub fn seen(&self) -> Vec<Echo> {
        self.shared.seen.lock().clone()
    }

    /// Tells every connection to go (`GOAWAY`); what runs on them may finish.
    pub fn leave(&self) {
        self.shared.leaving.send_modify(|times| *times += 1);
    }

    /// Closes everything at once and returns when it is closed. The counters can still be read.
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
    });
    let server = Arc::clone(&shared);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            server.accepted.fetch_add(1, Ordering::Relaxed);
            let server = Arc::clone(&server);
            tokio::spawn(async move {
                server.open.fetch_add(1, Ordering::Relaxed);
                // An error is the peer's: it has been told.
                let _ = connection(tcp, &server).await;
                server.open.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    Ok(shared)
}

/// One connection to its end.
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
            // A plan asks for the end of the connection: nothing more is said on it.
            _ = closed.wait_for(|close| *close) => return Ok(()),
            Ok(()) = leaving.changed() => {
                connection.graceful_shutdown();
                continue;
            }
            accepted = connection.accept() => accepted,
        };
        let Some(accepted) = accepted else {
            // Closing before the peer does, with frames of its own unread, would take back what is still on its way.
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

/// The connection, and another handle to it.
fn kept(tcp: TcpStream) -> std::io::Result<(TcpStream, std::net::TcpStream)> {
    let tcp = tcp.into_std()?;
    let kept = tcp.try_clone()?;
    Ok((TcpStream::from_std(tcp)?, kept))
}

/// Waits for the peer to end the connection.
async fn read_out(tcp: std::net::TcpStream) -> std::io::Result<()> {
    let mut tcp = TcpStream::from_std(tcp)?;
    tokio::io::copy(&mut tcp, &mut tokio::io::sink()).await?;
    Ok(())
}
