//! A client's HTTP/2 connection: hyper speaks it, and each of its streams is a request of its own.
//!
//! Bounded by the streams at once, the bytes of their heads, the windows, and the time without a request.

use std::{cell::Cell, net::SocketAddr, pin::pin, rc::Rc, time::Duration};

use bytes::BytesMut;
use hyper::{server::conn::http2::Builder, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    client::{Client, ClientStream},
    http::{head::HeadLimits, request::from_http2},
    local::Local,
    proxy,
    worker::{Current, Worker},
};

/// Of a request's body, before anything is read of it.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Of a response, per stream, beyond what the client's window takes.
const SEND_BUFFER: usize = 64 << 10;
/// A client that is silent for so long is asked whether it is there, and has so long to say so.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// Requests at once, and since when there has been none.
struct Activity {
    requests: Cell<usize>,
    idle_since: Cell<Instant>,
}

struct Active(Rc<Activity>);

impl Activity {
    fn begin(self: &Rc<Self>) -> Active {
        self.requests.set(self.requests.get() + 1);
        Active(Rc::clone(self))
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
    }
}

/// Serves the connection to its end; `read` is what has been read of it, and `tls` whether it is encrypted.
pub(super) async fn serve<S>(current: &Rc<Current>, read: BytesMut, stream: S, peer: SocketAddr, tls: bool)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let worker = current.worker();
    let config = &worker.shared.config;
    let activity = Rc::new(Activity { requests: Cell::new(0), idle_since: Cell::new(Instant::now()) });
    let requests = TaskTracker::new();
    let service = {
        let (current, activity, requests) = (Rc::clone(current), Rc::clone(&activity), requests.clone());
        service_fn(move |request| {
            let (worker, active) = (current.worker(), activity.begin());
            let (parts, stream, answer) = ClientStream::new(request, tls);
            requests.spawn_local(async move {
                one(&worker, parts, stream, peer).await;
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
            () = activity.idle(config.timeouts.keep_alive) => worker.shared.metrics.client_idle_closed(),
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

async fn one(worker: &Worker, parts: http::request::Parts, stream: ClientStream, peer: SocketAddr) {
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let (begun, ended) = (Instant::now(), stream.is_read());
    let mut client = Client::Http2(stream);
    let path = parts.uri.path().to_owned();
    match from_http2(parts, ended, &limits) {
        Ok(head) => drop(proxy::run(worker, &mut client, head, begun, peer, &mut None).await),
        Err(error) => proxy::refuse(worker, &mut client, &error.into(), &path).await,
    }
}
