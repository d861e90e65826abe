//! A client's HTTP/2 connection. h2 implements the protocol; each stream is served as a request.
//!
//! Bounded by: concurrent streams, bytes of their heads and the time for each, windows, time without a request, time
//! without acknowledgements, and the budgets of [`Traffic`] for resets and for frames without content.

mod io;
mod silence;

use std::{
    cell::Cell,
    future::poll_fn,
    pin::pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{
    PingPong, Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    io::CountedIo,
    silence::{PONG_TIMEOUT, unresponsive},
};
use super::{ClientPeer, age::ConnectionAge, head_limit};
use crate::{
    client::{
        Client, ClientIo, ClientStream, Traffic,
        close::{Linger, discard},
        reach::ReachWatch,
    },
    config::Config,
    deadline::with_deadline,
    http::{frame_heads::MAX_FRAME_ERRORS, head::HeadLimits, request::from_http2},
    kernel::socket,
    proxy::{self, Panicked, RefusedHead},
    room::IdleState,
    worker::{Current, Worker},
};

/// Receive window of a request body per stream, in bytes.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of a response buffered per stream beyond the client's window.
const SEND_BUFFER: usize = 64 << 10;
/// What small DATA frames that no stream has taken yet may cost, in bytes beyond their content: h2 counts 256 bytes for each. A turn of
/// a connection reads a small part of it, so that only streams that take nothing use it up.
const DATA_FRAMES: usize = 4 << 20;
/// Requests that were reset before the agent accepted them. More than a turn reads, because [`Traffic`] counts resets.
const PENDING_RESETS: usize = 4096;
/// How long a connection that is shed may take to send GOAWAY.
const SHED_TIMEOUT: Duration = Duration::from_millis(100);
/// How long a client without requests may take to acknowledge that the agent is leaving (RFC 9113 section 6.8).
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a final GOAWAY may take to be sent.
const GOAWAY_TIMEOUT: Duration = Duration::from_secs(1);
/// Checks of a stalled client within its time limit.
const CHECKS: u32 = 4;

/// The number of running requests, and since when it has been zero.
struct Activity {
    requests: Cell<usize>,
    idle_since: Cell<Instant>,
    /// Whether the connection has had a request.
    used: Cell<bool>,
    first: Notify,
    /// A request handler panicked: running requests finish, then the connection closes.
    faulty: Notify,
    idle_state: IdleState,
}

struct Active(Rc<Activity>);

impl Activity {
    fn new(idle_state: IdleState) -> Self {
        idle_state.set_idle();
        let idle_since = Cell::new(Instant::now());
        Self {
            requests: Cell::new(0),
            idle_since,
            used: Cell::new(false),
            first: Notify::new(),
            faulty: Notify::new(),
            idle_state,
        }
    }

    fn begin(self: &Rc<Self>) -> Active {
        self.requests.set(self.requests.get() + 1);
        self.idle_state.set_busy();
        self.used.set(true);
        self.first.notify_one();
        Active(Rc::clone(self))
    }

    /// Resolves when the agent leaves and the connection has had a request: a client that gets GOAWAY before its first
    /// request would reconnect immediately.
    async fn must_leave(&self, leaving: &CancellationToken) {
        leaving.cancelled().await;
        while !self.used.get() {
            self.first.notified().await;
        }
    }

    /// Resolves when the connection is idle and chosen to be shed.
    async fn shed(&self) {
        loop {
            self.idle_state.shed().await;
            if self.requests.get() == 0 {
                return;
            }
        }
    }

    /// Resolves when the connection takes no further requests. True if it is shed in favour of another one.
    async fn leave(&self, current: &Current, age: ConnectionAge) -> bool {
        let (draining, leaving) = {
            let worker = current.worker();
            (worker.shared.draining.clone(), worker.shared.leaving.clone())
        };
        tokio::select! {
            () = draining.cancelled() => false,
            () = self.must_leave(&leaving) => false,
            () = self.faulty.notified() => false,
            () = age.passed(current) => {
                current.worker().shared.metrics.client_aged();
                false
            }
            () = self.unused(current) => {
                current.worker().shared.metrics.client_idle_closed();
                false
            }
            () = self.shed() => {
                current.worker().shared.metrics.client_shed();
                true
            }
        }
    }

    /// Resolves when there has been no request for the current `timeouts.keep_alive`.
    async fn unused(&self, current: &Current) {
        loop {
            let limit = current.worker().shared.config.timeouts.keep_alive;
            let idle = async {
                match limit {
                    Some(limit) => self.idle(limit).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = idle => return,
                () = current.replaced() => {}
            }
        }
    }

    /// Resolves when there has been no request for `limit`.
    async fn idle(&self, limit: Duration) {
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
    /// Whether this is the only request on the connection.
    fn is_only(&self) -> bool {
        self.0.requests.get() == 1
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.requests.set(self.0.requests.get() - 1);
        self.0.idle_since.set(Instant::now());
        if self.0.requests.get() == 0 {
            self.0.idle_state.set_idle();
        }
    }
}

/// Serves the connection to its end; `read` holds bytes already read from it, the first at `begun`.
pub(super) async fn serve(current: &Rc<Current>, read: BytesMut, wire: ClientIo, begun: Instant, peer: ClientPeer) {
    let worker = current.worker();
    let config = &worker.shared.config;
    let (listen, heads) = (&config.listen, HeadLimits::of(&config.limits));
    let traffic = Traffic::new(wire, begun, listen.http2_resets, listen.http2_control_frames, heads.header_block());
    let traffic = Rc::new(traffic);
    let requests = TaskTracker::new();
    let io = CountedIo::new(Rc::clone(&traffic), read);
    let shaken = handshake(config, io, begun).await;
    drop(worker);
    let ending = match shaken {
        Some(Ok(connection)) => run(current, connection, &traffic, &peer, &requests).await,
        Some(Err(error)) => {
            tracing::debug!(peer = %peer.address, %error, "HTTP/2 handshake failed");
            Ending::Reading
        }
        None => Ending::Stuck,
    };
    // Requests still running end with the connection; waits until they are accounted for.
    requests.close();
    requests.wait().await;
    let Some(traffic) = Rc::into_inner(traffic) else { return };
    let wire = traffic.into_wire();
    match ending {
        Ending::Reading => {
            let linger = Linger::new(&current.worker().shared.config, false);
            if let Err(cut) = discard(wire, BytesMut::new(), linger).await {
                current.worker().shared.metrics.client_linger_cut(cut);
            }
        }
        Ending::Done => {}
        // The client will not read the queued bytes, so the kernel should drop them.
        Ending::Stuck => socket::set_reset_on_close(wire.tcp(), true),
    }
}

/// How a connection ended.
enum Ending {
    /// The client may still be sending.
    Reading,
    /// Nothing is in transit.
    Done,
    /// The client does not read the queued bytes.
    Stuck,
}

/// `None` if the client did not complete the handshake in time.
async fn handshake(
    config: &Config,
    io: CountedIo,
    begun: Instant,
) -> Option<Result<Connection<CountedIo, Bytes>, h2::Error>> {
    let handshake = Builder::new()
        .max_concurrent_streams(config.listen.http2_max_streams)
        .max_header_list_size(HeadLimits::of(&config.limits).header_list())
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(DATA_FRAMES)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        // `Traffic` ends the connection for wrong requests long before, but does not count frames on streams that are over.
        .max_local_error_reset_streams(Some(MAX_FRAME_ERRORS))
        .handshake(io);
    with_deadline(head_limit(config).map(|limit| begun + limit), handshake).await
}

/// Runs the whole connection.
async fn run(
    current: &Rc<Current>,
    mut connection: Connection<CountedIo, Bytes>,
    traffic: &Rc<Traffic>,
    peer: &ClientPeer,
    requests: &TaskTracker,
) -> Ending {
    let activity = Rc::new(Activity::new(IdleState::new(&current.idle)));
    let ping = connection.ping_pong();
    let mut over = pin!(over(current, traffic, ping, &activity));
    let mut leave = pin!(activity.leave(current, ConnectionAge::since(Instant::now())));
    let mut leaving = false;
    let reason = loop {
        tokio::select! {
            biased;
            reason = over.as_mut() => break reason,
            accepted = poll_fn(|cx| poll_accept(&mut connection, traffic, cx)) => match accepted {
                Some(Ok((request, answer))) => {
                    let served = serve_request(current.worker(), request, answer, peer.clone(), Rc::clone(traffic), activity.begin());
                    requests.spawn_local(served);
                }
                Some(Err(error)) => {
                    tracing::debug!(peer = %peer.address, %error, "HTTP/2 connection failed");
                    return Ending::Reading;
                }
                None => return Ending::Reading,
            },
            () = activity.idle(LEAVE_TIMEOUT), if leaving => break "silent",
            shed = leave.as_mut(), if !leaving => {
                leaving = true;
                activity.idle_since.set(Instant::now());
                connection.graceful_shutdown();
                if shed {
                    // An idle client needs no time to finish.
                    let _ = timeout(SHED_TIMEOUT, closed(&mut connection, traffic)).await;
                    return Ending::Done;
                }
            }
        }
    };
    tracing::debug!(peer = %peer.address, reason, "closing HTTP/2 connection");
    current.worker().shared.metrics.http2_ended(reason);
    close(connection, traffic, reason).await
}

/// Resolves when the client broke a limit or is not reachable any more. Returns the reason.
async fn over(current: &Current, traffic: &Traffic, ping: Option<PingPong>, activity: &Activity) -> &'static str {
    // A client with a request may take as long to read on as it may take to accept its response.
    let patience = || match activity.requests.get() {
        0 => Some(PONG_TIMEOUT),
        _ => current.worker().shared.config.timeouts.idle.map(|idle| idle.max(PONG_TIMEOUT)),
    };
    let mut unresponsive = pin!(unresponsive(traffic, ping, patience));
    let mut stalled = pin!(stalled(current, traffic));
    loop {
        let (head, unreachable) = {
            let worker = current.worker();
            (head_limit(&worker.shared.config), worker.shared.config.timeouts.client_unreachable)
        };
        let watch = ReachWatch::new(unreachable);
        tokio::select! {
            reason = traffic.ended() => return reason,
            () = overdue(traffic, head) => return "head",
            () = unresponsive.as_mut() => return "silent",
            () = stalled.as_mut() => {
                current.worker().shared.metrics.client_stalled();
                return "stalled";
            }
            () = poll_fn(|cx| watch.poll_gone(traffic.wire().borrow().tcp(), cx)) => return "unreachable",
            () = current.replaced() => {}
        }
    }
}

/// Resolves when the client has taken too long for a head. It blocks the connection's other frames, so nothing is lost by the end.
async fn overdue(traffic: &Traffic, limit: Option<Duration>) {
    match limit {
        Some(limit) => traffic.overdue(limit).await,
        None => std::future::pending().await,
    }
}

/// Closes the connection with GOAWAY.
async fn close(mut connection: Connection<CountedIo, Bytes>, traffic: &Traffic, reason: &'static str) -> Ending {
    traffic.end(reason);
    // Bytes queued for streams have to be sent before GOAWAY; h2 sends nothing after it.
    let _ = poll_fn(|cx| Poll::Ready(connection.poll_accept(cx).is_ready())).await;
    connection.abrupt_shutdown(match reason {
        "resets" | "frames" => Reason::ENHANCE_YOUR_CALM,
        _ => Reason::NO_ERROR,
    });
    match timeout(GOAWAY_TIMEOUT, closed(&mut connection, traffic)).await {
        Ok(()) => Ending::Reading,
        Err(_) => Ending::Stuck,
    }
}

/// Resolves when the connection has sent everything and ended.
async fn closed(connection: &mut Connection<CountedIo, Bytes>, traffic: &Traffic) {
    while let Some(Ok(_)) = poll_fn(|cx| poll_accept(connection, traffic, cx)).await {}
}

/// A request that the client has begun.
type OpenedStream = (http::Request<RecvStream>, SendResponse<Bytes>);

/// Polls for the next request. Reads no more than a turn's frames before the streams run.
fn poll_accept(
    connection: &mut Connection<CountedIo, Bytes>,
    traffic: &Traffic,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<OpenedStream, h2::Error>>> {
    let polled = connection.poll_accept(cx);
    match &polled {
        Poll::Ready(Some(Ok(_))) => traffic.accepted(),
        Poll::Ready(_) => {}
        Poll::Pending => traffic.next_turn(),
    }
    polled
}

/// Resolves when the client's queued bytes have been unacknowledged for `timeouts.idle`.
async fn stalled(current: &Current, traffic: &Traffic) {
    let (mut acknowledged, mut since) = (traffic.acknowledged().unwrap_or_default(), Instant::now());
    loop {
        let limit = current.worker().shared.config.timeouts.idle;
        let Some(idle) = limit else {
            current.replaced().await;
            since = Instant::now();
            continue;
        };
        tokio::time::sleep(idle / CHECKS).await;
        let (now, queued) = (traffic.acknowledged(), traffic.queued().unwrap_or_default());
        // The reader reports the error.
        let now = now.unwrap_or(acknowledged);
        if now != acknowledged || queued == 0 {
            (acknowledged, since) = (now, Instant::now());
        } else if since.elapsed() >= idle {
            return;
        }
    }
}

async fn serve_request(
    worker: Rc<Worker>,
    request: http::Request<RecvStream>,
    answer: SendResponse<Bytes>,
    peer: ClientPeer,
    traffic: Rc<Traffic>,
    active: Active,
) {
    let config = &worker.shared.config;
    let limits = HeadLimits::of(&config.limits);
    let (mut parts, stream) = ClientStream::new(request, answer, Rc::clone(&traffic));
    let origin = peer.origin(Instant::now(), None);
    let ended = stream.is_read();
    let mut client = Client::Http2(stream);
    match from_http2(&mut parts, ended, &limits) {
        Ok(head) => {
            if let Err(Panicked(_)) = proxy::guarded(&worker, &mut client, head, origin, &mut None).await {
                active.0.faulty.notify_one();
            }
        }
        Err(error) => {
            let path = parts.uri.path().to_owned();
            let refused = RefusedHead { method: parts.method, path, headers: parts.headers };
            proxy::refuse(&worker, &mut client, &error.into(), refused, origin).await;
        }
    }
    let Client::Http2(mut stream) = client else { return };
    if !stream.is_answered() {
        traffic.reset();
    }
    if stream.has_stalled() {
        worker.shared.metrics.client_stalled();
    }
    // The stream's head may have been sent somewhat after the wait began.
    let still = stream.idle().is_some_and(|idle| traffic.last_content().elapsed() >= idle / 2);
    let ends = stream.has_stalled() && active.is_only() && still;
    if let Err(cut) = stream.discard(Linger::new(config, true)).await {
        worker.shared.metrics.client_linger_cut(cut);
    }
    stream.settle().await;
    drop(stream);
    if ends {
        traffic.end("stalled");
    }
}
