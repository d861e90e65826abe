//! A client's HTTP/2 stream: one request, whose body arrives in frames, and one answer.
//!
//! The connection (`connection::http2`) handles the frames. Waits for the client's windows take at most
//! `timeouts.idle`; then the stream is reset. Dropping this before the answer is complete resets the stream.

use std::{future::poll_fn, io, pin::pin, rc::Rc, time::Duration};

use bytes::Bytes;
use futures_util::future::FutureExt as _;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Response, header, request};
use hyper::body::Frame;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    close::{Cut, Linger},
    traffic::{Stall, Traffic},
};
use crate::http::date;

/// Checks of a waiting stream within its limit.
const CHECKS: u32 = 4;

pub struct ClientStream {
    body: RecvStream,
    state: StreamState,
    tls: bool,
    id: u32,
    traffic: Rc<Traffic>,
    /// Bytes of the response body sent so far.
    sent: u64,
    /// Interim heads so far.
    interim: u64,
    /// How long the client may go without opening its window.
    idle: Option<Duration>,
    stalled: bool,
}

enum StreamState {
    Unanswered(SendResponse<Bytes>),
    Flowing(SendStream<Bytes>),
    /// The head ended the stream; [`ClientStream::end`] is still to be called.
    Ended,
    Answered,
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl ClientStream {
    pub(crate) fn new(
        request: http::Request<RecvStream>,
        answer: SendResponse<Bytes>,
        traffic: Rc<Traffic>,
    ) -> (request::Parts, Self) {
        let (parts, body) = request.into_parts();
        let (id, tls) = (answer.stream_id().as_u32(), traffic.wire().borrow().is_tls());
        traffic.open(id);
        let state = StreamState::Unanswered(answer);
        (parts, Self { body, state, tls, id, traffic, sent: 0, interim: 0, idle: None, stalled: false })
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Whether the answer's head has been sent.
    pub fn is_answered(&self) -> bool {
        !matches!(self.state, StreamState::Unanswered(_))
    }

    /// Sets how long the client may go without opening its window.
    pub fn set_idle(&mut self, idle: Option<Duration>) {
        self.idle = idle;
    }

    pub fn idle(&self) -> Option<Duration> {
        self.idle
    }

    /// Returns the next frame of the request body. Cancel-safe.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, h2::Error>> {
        if let Some(data) = self.body.data().await {
            return Some(data.and_then(|data| {
                self.body.flow_control().release_capacity(data.len())?;
                Ok(Frame::data(data))
            }));
        }
        self.body.trailers().await.map(|trailers| trailers.map(Frame::trailers)).transpose()
    }

    /// Whether the request body has been read to its end.
    pub fn is_read(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Whether a part of the request body has arrived that is not read yet, or its end.
    pub fn has_begun(&mut self) -> bool {
        self.is_read() || self.body.flow_control().used_capacity() > 0
    }

    /// After the whole answer: reads and discards what the client still sends. Many clients lose an answer that comes together with
    /// the reset of their upload, though RFC 9113 §8.1 forbids that. `Err` if a limit was reached before the end of the request.
    pub async fn discard(&mut self, linger: Linger) -> Result<(), Cut> {
        if !matches!(self.state, StreamState::Answered) {
            return Ok(());
        }
        let until = Instant::now() + linger.time;
        let mut taken = 0;
        while !self.is_read() {
            match timeout_at(until, timeout(linger.quiet, self.frame())).await {
                Err(_) => return Err("time"),
                Ok(Err(_)) => return Err("quiet"),
                Ok(Ok(None | Some(Err(_)))) => return Ok(()),
                Ok(Ok(Some(Ok(frame)))) => taken += frame.data_ref().map_or(0, |data| data.len() as u64),
            }
            if taken > linger.bytes {
                return Err("bytes");
            }
        }
        Ok(())
    }

    /// Whether the client has stalled.
    pub fn has_stalled(&self) -> bool {
        self.stalled
    }

    /// Resolves when the client is gone. Cancel-safe.
    pub async fn gone(&mut self) {
        // A reset and an error both mean that the client is gone.
        match &mut self.state {
            StreamState::Unanswered(answer) => drop(poll_fn(|cx| answer.poll_reset(cx)).await),
            StreamState::Flowing(out) => drop(poll_fn(|cx| out.poll_reset(cx)).await),
            StreamState::Ended | StreamState::Answered => std::future::pending().await,
        }
    }

    /// Sends a complete answer and waits until the client takes it.
    pub async fn reply(&mut self, head: Response<()>, body: Bytes) -> io::Result<()> {
        if body.is_empty() {
            return self.head(head, true);
        }
        self.head(head, false)?;
        self.write(body, true).await
    }

    /// Sends an interim head, and waits until it has been written: an endpoint that sends many is not read faster than the
    /// client is written to. `TimedOut` when the client took nothing for too long.
    pub async fn interim(&mut self, head: Response<()>) -> io::Result<()> {
        let StreamState::Unanswered(answer) = &mut self.state else { return Err(gone()) };
        answer.send_informational(head).map_err(io::Error::other)?;
        self.interim += 1;
        let written = async {
            tokio::select! {
                () = self.traffic.written(self.id, self.interim, 0) => Ok(()),
                _ = poll_fn(|cx| answer.poll_reset(cx)) => Err(gone()),
            }
        };
        // Every acknowledged byte is progress towards the head.
        let stalls = || self.traffic.watch(self.id, u64::MAX, self.idle.unwrap_or_default());
        let done = patiently(written, self.idle, stalls, &self.traffic).await;
        self.stalled = done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        done
    }

    /// Sends the head of an answer whose body follows.
    pub fn begin(&mut self, head: Response<()>) -> io::Result<()> {
        self.head(head, false)
    }

    /// Sends the head of an answer without a body; [`end`](Self::end) must still be called.
    pub fn begin_and_end(&mut self, head: Response<()>) -> io::Result<()> {
        self.head(head, true)?;
        self.state = StreamState::Ended;
        Ok(())
    }

    fn head(&mut self, mut head: Response<()>, ends: bool) -> io::Result<()> {
        head.headers_mut().entry(header::DATE).or_insert_with(date::now);
        let StreamState::Unanswered(answer) = &mut self.state else { return Err(gone()) };
        let out = answer.send_response(head, ends).map_err(io::Error::other)?;
        self.state = if ends { StreamState::Answered } else { StreamState::Flowing(out) };
        Ok(())
    }

    /// Sends a piece of the body and waits until the client takes it. Not cancel-safe: after a cancelled call the
    /// stream can only be aborted.
    pub async fn data(&mut self, piece: Bytes) -> io::Result<()> {
        self.write(piece, false).await
    }

    pub async fn end(&mut self, trailers: HeaderMap) -> io::Result<()> {
        match std::mem::replace(&mut self.state, StreamState::Answered) {
            StreamState::Flowing(mut out) if trailers.is_empty() => {
                out.send_data(Bytes::new(), true).map_err(|_| gone())
            }
            StreamState::Flowing(mut out) => out.send_trailers(trailers).map_err(|_| gone()),
            StreamState::Ended => Ok(()),
            _ => Err(gone()),
        }
    }

    /// Waits until everything that h2 has queued is written, while the client makes progress. Called before a reset, which would
    /// discard the queue.
    pub async fn settle(&mut self) {
        let StreamState::Flowing(out) = &mut self.state else { return };
        if self.stalled {
            return;
        }
        let written = async {
            tokio::select! {
                () = self.traffic.written(self.id, self.interim + 1, self.sent) => Ok(()),
                _ = poll_fn(|cx| out.poll_reset(cx)) => Err(gone()),
            }
        };
        let stalls = || self.traffic.watch(self.id, self.sent, self.idle.unwrap_or_default());
        let _ = patiently(written, self.idle, stalls, &self.traffic).await;
    }

    /// Whether trailers that the client sent may lack fields.
    pub fn lacks_trailers(&self) -> bool {
        self.traffic.lacks_fields(self.id)
    }

    /// Gives h2 only what fits into the windows, so that nothing is queued for a stalled client.
    async fn write(&mut self, mut piece: Bytes, ends: bool) -> io::Result<()> {
        while !piece.is_empty() {
            let room = self.room(piece.len()).await?;
            let StreamState::Flowing(out) = &mut self.state else { return Err(gone()) };
            let now = piece.split_to(room.min(piece.len()));
            self.sent += now.len() as u64;
            out.send_data(now, ends && piece.is_empty()).map_err(|_| gone())?;
        }
        if ends {
            self.state = StreamState::Answered;
        }
        Ok(())
    }

    /// Waits for room for up to `wanted` bytes. Returns `TimedOut` if the client made no room for too long.
    async fn room(&mut self, wanted: usize) -> io::Result<usize> {
        let StreamState::Flowing(out) = &mut self.state else { return Err(gone()) };
        // Reserves only when there is something to send: what one stream reserves of the connection's window is lost to
        // the others.
        out.reserve_capacity(wanted);
        if out.capacity() > 0 {
            return Ok(out.capacity());
        }
        let room = async {
            // Also ready if another stream has taken the capacity meanwhile.
            while out.capacity() == 0 {
                let Some(Ok(_)) = poll_fn(|cx| out.poll_capacity(cx)).await else { return Err(gone()) };
            }
            Ok(out.capacity())
        };
        let stalls = || self.traffic.watch(self.id, self.sent, self.idle.unwrap_or_default());
        let room = patiently(room, self.idle, stalls, &self.traffic).await;
        self.stalled = room.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        room
    }
}

/// Waits for `work` while the client makes progress, which `stall` checks several times within `idle`.
async fn patiently<T>(
    work: impl Future<Output = io::Result<T>>,
    idle: Option<Duration>,
    stall: impl FnOnce() -> io::Result<Stall>,
    traffic: &Traffic,
) -> io::Result<T> {
    let Some(idle) = idle else { return work.await };
    let mut work = pin!(work);
    // Most waits end at once.
    if let Some(done) = work.as_mut().now_or_never() {
        return done;
    }
    let mut stall = stall()?;
    loop {
        if let Ok(done) = timeout(idle / CHECKS, work.as_mut()).await {
            return done;
        }
        stall.look(traffic)?;
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        self.traffic.close(self.id);
        let reason = if self.stalled { Reason::CANCEL } else { Reason::INTERNAL_ERROR };
        match &mut self.state {
            StreamState::Unanswered(answer) => answer.send_reset(reason),
            StreamState::Flowing(out) => out.send_reset(reason),
            StreamState::Ended | StreamState::Answered => {}
        }
    }
}
