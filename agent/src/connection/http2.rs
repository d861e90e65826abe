//! A client's HTTP/2 connection: hyper speaks it, and each of its streams is a request of its own.
//!
//! Bounded by the streams at once, the bytes of their heads, the windows, and the time without a request.

use std::{cell::Cell, net::SocketAddr, pin::pin, rc::Rc, time::Duration};

use bytes::BytesMut;
use hyper::{server::conn::http2::Builder, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    sync::Notify,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    client::{Client, ClientStream},
    http::{head::HeadLimits, request::from_http2},
    local::Local,
    proxy::{self, Panicked},
    room::Resting,
    worker::{Current, Worker},
};

/// Of a request's body, before anything is read of it.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Of a response, per stream, beyond what the client's window takes.
const SEND_BUFFER: usize = 64 << 10;
/// How long a connection that ends for another one may take to say so.
const GOODBYE: Duration = Duration::from_millis(100);
/// A client that is silent for so long is asked whether it is there, and has so long to say so.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// Requests at once, and since when there has been none.
struct Activity {
    requests: Cell<usize>,
    idle_since: Cell<Instant>,
    /// There has been one.
    used: Cell<bool>,
    first: Notify,
    /// The processing of a request has panicked: those that run end, and the connection with them.
    faulty: Notify,
    resting: Resting,
}

struct Active(Rc<Activity>);

impl Activity {
    fn begin(self: &Rc<Self>) -> Active {
        self.requests.set(self.requests.get() + 1);
        self.resting.end();
        self.used.set(true);
        self.first.notify_one();
        Active(Rc::clone(self))
    }

    /// Resolves when the agent leaves and the connection has been of use: a client that is told to go away before its first
    /// request would come back at once.
    async fn leaves(&self, leaving: &CancellationToken) {
        leaving.cancelled().await;
        while !self.used.get() {
            self.first.notified().await;
        }
    }

    /// Resolves when the connection has no request and is to end for another one.
    async fn shed(&self) {
        loop {
            self.resting.closed().await;
            if self.requests.get() == 0 {
                return;
            }
        }
    }

    /// Resolves when there has been no request for `limit`.
    async fn idle(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            tokio::time::sleep_until(self.idle_since.get() + limit).await;
            if self.requests.get() == 0 && self.idle_since.get().elapsed() >= limit {
                return;
            }
            if self.requests.get() > 0 {
                self.idle_since.set(Instant::now());
            }
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.requests.set(self.0.requests.get() - 1);
        self.0.idle_since.set(Instant::now());
        if self.0.requests.get() == 0 {
            self.0.resting.begin();
        }
    }
}

/// Serves the connection to its end; `read` is what has been read of it, and `tls` whether it is encrypted.
pub(super) async fn serve<S>(current: &Rc<Current>, read: BytesMut, stream: S, peer: SocketAddr, tls: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let worker = current.worker();
    let config = &worker.shared.config;
    let activity = Rc::new(Activity {
        requests: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        used: Cell::new(false),
        first: Notify::new(),
        faulty: Notify::new(),
        resting: Resting::new(&current.idle),
    });
    activity.resting.begin();
    let requests = TaskTracker::new();
    let service = {
        let (current, activity, requests) = (Rc::clone(current), Rc::clone(&activity), requests.clone());
        service_fn(move |request| {
            let (worker, active) = (current.worker(), activity.begin());
            let (parts, stream, answer) = ClientStream::new(request, tls);
            requests.spawn_local(async move {
                if let Err(Panicked(_)) = one(&worker, parts, stream, peer).await {
                    active.0.faulty.notify_one();
                }
                drop(active);
            });
            // An answer that never comes resets the stream.
            answer
        })
    };
    let (reader, writer) = tokio::io::split(stream);
    let io = TokioIo::new(tokio::io::join(std::io::Cursor::new(read).chain(reader), writer));
    let connection = Builder::new(Local)
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.listen.http2_max_streams)
        .max_header_list_size(config.limits.head_bytes as u32)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .serve_connection(io, service);
    let ended = async {
        let mut connection = pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = worker.shared.draining.cancelled() => {}
            () = activity.leaves(&worker.shared.leaving) => {}
            () = activity.faulty.notified() => {}
            () = activity.idle(config.timeouts.keep_alive) => worker.shared.metrics.client_idle_closed(),
            () = activity.shed() => {
                worker.shared.metrics.client_shed();
                connection.as_mut().graceful_shutdown();
                // Whoever is idle needs no time to finish.
                return tokio::time::timeout(GOODBYE, connection).await.unwrap_or(Ok(()));
            }
        }
        connection.as_mut().graceful_shutdown();
        connection.await
    };
    if let Err(error) = ended.await {
        tracing::debug!(%peer, %error, "HTTP/2 connection");
    }
    // With the connection gone, what still runs ends; and it is accounted for.
    requests.close();
    requests.wait().await;
}

async fn one(
    worker: &Worker,
    parts: http::request::Parts,
    stream: ClientStream,
    peer: SocketAddr,
) -> Result<(), Panicked> {
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let (begun, ended) = (Instant::now(), stream.is_read());
    let mut client = Client::Http2(stream);
    let path = parts.uri.path().to_owned();
    match from_http2(parts, ended, &limits) {
        Ok(head) => proxy::guarded(worker, &mut client, head, begun, peer, &mut None).await.map(drop),
        Err(error) => {
            proxy::refuse(worker, &mut client, &error.into(), &path).await;
            Ok(())
        }
    }
}
