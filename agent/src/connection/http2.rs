//! A client's HTTP/2 connection: h2 speaks it, and each of its streams is a request of its own.
//!
//! Bounded by the streams at once, the bytes of their heads, the windows, the time without a request, the time in which the
//! client takes nothing, and the budgets of [`Traffic`] for requests taken back and for frames that carry nothing.

mod io;

use std::{cell::Cell, future::poll_fn, net::SocketAddr, pin::pin, rc::Rc, task::Poll, time::Duration};

use bytes::{Bytes, BytesMut};
use h2::{
    Ping, PingPong, Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::io::CountedIo;
use super::within;
use crate::{
    client::{
        Client, ClientStream, Traffic, Wire,
        close::{Linger, discard},
        reach::Watch,
    },
    http::{head::HeadLimits, request::from_http2},
    kernel::socket,
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
/// For a GOAWAY behind which the connection ends.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Looks at a client that takes nothing, within the time that it may.
const LOOKS: u32 = 4;

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

impl Active {
    /// There is no other request on the connection.
    fn is_only(&self) -> bool {
        self.0.requests.get() == 1
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

/// Serves the connection to its end; `read` is what has been read of it.
pub(super) async fn serve(current: &Rc<Current>, read: BytesMut, wire: Wire, peer: SocketAddr) {
    let worker = current.worker();
    let listen = &worker.shared.config.listen;
    let traffic = Rc::new(Traffic::new(wire, listen.http2_resets, listen.http2_control_frames));
    let requests = TaskTracker::new();
    let left = exchange(current, &worker, &traffic, read, peer, &requests).await;
    // With the connection gone, what still runs ends; and it is accounted for.
    requests.close();
    requests.wait().await;
    let Some(traffic) = Rc::into_inner(traffic) else { return };
    let wire = traffic.into_wire();
    match left {
        Left::Reading => {
            let linger = Linger::new(&worker.shared.config, false);
            if let Err(cut) = discard(wire, BytesMut::new(), linger).await {
                worker.shared.metrics.client_linger_cut(cut);
            }
        }
        Left::Done => {}
        // What is queued will not be taken, and the kernel need not keep it.
        Left::Stuck => socket::set_reset_on_close(wire.tcp(), true),
    }
}

/// How a connection has ended.
enum Left {
    /// The client may be sending.
    Reading,
    /// Nothing is on its way.
    Done,
    /// The client does not take what it was sent last.
    Stuck,
}

/// The whole of the connection.
async fn exchange(
    current: &Rc<Current>,
    worker: &Worker,
    traffic: &Rc<Traffic>,
    read: BytesMut,
    peer: SocketAddr,
    requests: &TaskTracker,
) -> Left {
    let (shared, config) = (&worker.shared, &worker.shared.config);
    let activity = Rc::new(Activity {
        requests: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        used: Cell::new(false),
        first: Notify::new(),
        faulty: Notify::new(),
        resting: Resting::new(&current.idle),
    });
    activity.resting.begin();
    let handshake = Builder::new()
        .max_concurrent_streams(config.listen.http2_max_streams)
        .max_header_list_size(config.limits.head_bytes as u32)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake::<_, Bytes>(CountedIo::new(Rc::clone(traffic), read));
    let until = config.timeouts.head.map(|limit| Instant::now() + limit);
    let mut connection = match within(until, handshake).await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) => {
            tracing::debug!(%peer, %error, "HTTP/2 connection");
            return Left::Reading;
        }
        None => return Left::Stuck,
    };
    let ping = connection.ping_pong();
    let watch = Watch::new(config.timeouts.client_unreachable);
    let mut over = pin!(async {
        tokio::select! {
            reason = traffic.ended() => reason,
            () = silent(traffic, ping) => "silent",
            () = untaken(traffic, config.timeouts.idle) => "stalled",
            () = poll_fn(|cx| watch.poll_gone(traffic.wire().borrow().tcp(), cx)) => "unreachable",
        }
    });
    // True: for another connection's sake.
    let mut leave = pin!(async {
        tokio::select! {
            () = shared.draining.cancelled() => false,
            () = activity.leaves(&shared.leaving) => false,
            () = activity.faulty.notified() => false,
            () = activity.idle(config.timeouts.keep_alive) => {
                shared.metrics.client_idle_closed();
                false
            }
            () = activity.shed() => {
                shared.metrics.client_shed();
                true
            }
        }
    });
    let mut leaving = false;
    let reason = loop {
        tokio::select! {
            biased;
            reason = over.as_mut() => break reason,
            accepted = poll_fn(|cx| connection.poll_accept(cx)) => match accepted {
                Some(Ok((request, answer))) => {
                    let one = one(current.worker(), request, answer, peer, Rc::clone(traffic), activity.begin());
                    requests.spawn_local(one);
                }
                Some(Err(error)) => {
                    tracing::debug!(%peer, %error, "HTTP/2 connection");
                    return Left::Reading;
                }
                None => return Left::Reading,
            },
            shed = leave.as_mut(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
                if shed {
                    // Whoever is idle needs no time to finish.
                    let _ = timeout(GOODBYE, closed(&mut connection)).await;
                    return Left::Done;
                }
            }
        }
    };
    tracing::debug!(%peer, reason, "HTTP/2 connection ended by the agent");
    shared.metrics.http2_ended(reason);
    traffic.end(reason);
    // What is queued for streams goes first: behind GOAWAY nothing does.
    let _ = poll_fn(|cx| Poll::Ready(connection.poll_accept(cx).is_ready())).await;
    connection.abrupt_shutdown(match reason {
        "resets" | "frames" => Reason::ENHANCE_YOUR_CALM,
        _ => Reason::NO_ERROR,
    });
    match timeout(LAST_WORD, closed(&mut connection)).await {
        Ok(()) => Left::Reading,
        Err(_) => Left::Stuck,
    }
}

/// The connection has sent what it had to, and has ended.
async fn closed(connection: &mut Connection<CountedIo, Bytes>) {
    while let Some(Ok(_)) = poll_fn(|cx| connection.poll_accept(cx)).await {}
}

/// Resolves when the client has said nothing, and does not say that it is there although it has been asked. One that is slow
/// to take what it is sent finds the question late.
async fn silent(traffic: &Traffic, ping: Option<PingPong>) {
    let Some(mut ping) = ping else { return std::future::pending().await };
    loop {
        sleep_until(traffic.heard() + PING).await;
        if traffic.heard().elapsed() < PING {
            continue;
        }
        let mut acknowledged = traffic.acknowledged();
        let Ok(()) = ping.send_ping(Ping::opaque()) else { return };
        loop {
            match timeout(PONG, poll_fn(|cx| ping.poll_pong(cx))).await {
                Ok(Ok(_)) => break,
                // The connection's own task says so.
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => {
                    let now = traffic.acknowledged();
                    if now.is_err() || now.as_ref().ok() == acknowledged.as_ref().ok() {
                        return;
                    }
                    acknowledged = now;
                }
            }
        }
    }
}

/// Resolves when the client has acknowledged nothing of what is queued for it for so long.
async fn untaken(traffic: &Traffic, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let (mut acknowledged, mut since) = (traffic.acknowledged().unwrap_or_default(), Instant::now());
    loop {
        tokio::time::sleep(idle / LOOKS).await;
        let (now, queued) = (traffic.acknowledged(), traffic.queued().unwrap_or_default());
        // An error is for whoever reads to find.
        let now = now.unwrap_or(acknowledged);
        if now != acknowledged || queued == 0 {
            (acknowledged, since) = (now, Instant::now());
        } else if since.elapsed() >= idle {
            return;
        }
    }
}

async fn one(
    worker: Rc<Worker>,
    request: http::Request<RecvStream>,
    answer: SendResponse<Bytes>,
    peer: SocketAddr,
    traffic: Rc<Traffic>,
    active: Active,
) {
    let config = &worker.shared.config;
    let limits = HeadLimits { bytes: config.limits.head_bytes, headers: config.limits.headers };
    let (parts, stream) = ClientStream::new(request, answer, Rc::clone(&traffic));
    let (begun, ended) = (Instant::now(), stream.is_read());
    let mut client = Client::Http2(stream);
    let path = parts.uri.path().to_owned();
    match from_http2(parts, ended, &limits) {
        Ok(head) => {
            if let Err(Panicked(_)) = proxy::guarded(&worker, &mut client, head, begun, peer, &mut None).await {
                active.0.faulty.notify_one();
            }
        }
        Err(error) => proxy::refuse(&worker, &mut client, &error.into(), &path).await,
    }
    let Client::Http2(stream) = client else { return };
    if !stream.is_answered() {
        traffic.reset();
    }
    if stream.has_stalled() {
        worker.shared.metrics.client_stalled();
    }
    // The stream's own head may have left somewhat after it began to wait.
    let still = stream.idle().is_some_and(|idle| traffic.moved().elapsed() >= idle / 2);
    let ends = stream.has_stalled() && active.is_only() && still;
    drop(stream);
    if ends {
        traffic.end("stalled");
    }
}
