//! Statistics of a client's HTTP/2 connection: bytes written per stream, the time of the last progress, and budgets
//! against abuse. The connection (`connection::http2`) records them, its streams read them.

mod budget;
mod refused;
mod unfinished;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use self::{budget::FrameBudget, refused::RefusedRequests, unfinished::UnfinishedHead};
use super::wire::ClientIo;
use crate::{
    http::frame_heads::{END_STREAM, FrameHead, LargeBlocks, kind},
    kernel::socket,
};

/// The time in which a budget refills completely: for resets and for frames.
const RESETS: Duration = Duration::from_secs(600);
const FRAMES: Duration = Duration::from_secs(10);
/// How many frames without message content one frame with content allows: a client may update the windows of stream and
/// connection for each DATA frame, and measure bandwidth by PINGs.
const EXPLAINED: u32 = 8;
/// How many frames are read before the streams run that they are for: until then, h2 keeps what it has read.
const TURN: u32 = 256;

/// What has been written of one stream's response.
#[derive(Debug, Default, Clone, Copy)]
struct Written {
    /// Of DATA.
    bytes: u64,
    heads: u64,
}

pub struct Traffic {
    wire: RefCell<ClientIo>,
    /// What has been written, by stream.
    written: RefCell<HashMap<u32, Written>>,
    /// Notified when a frame of a response has been written.
    response_written: Notify,
    /// Received heads and trailers that are too large.
    large: RefCell<LargeBlocks>,
    /// Requests that the client may reset before they are answered, or that h2 may refuse.
    resets: RefCell<FrameBudget>,
    refused: RefCell<RefusedRequests>,
    /// Frames that were read in this turn.
    turn: Cell<u32>,
    /// Whether h2 has taken everything that was read.
    is_taken: Cell<bool>,
    /// Whether a part has begun that is not complete.
    is_unfinished: Cell<bool>,
    /// Frames without message content.
    frames: RefCell<FrameBudget>,
    /// Time of the last frame with message content, in either direction.
    last_content: Cell<Instant>,
    /// Time of the last frame received.
    last_received: Cell<Instant>,
    /// What the client has begun to send and must complete before anything else.
    unfinished: UnfinishedHead,
    over: Cell<Option<&'static str>>,
    ended_notify: Notify,
}

impl Traffic {
    /// The connection's first byte arrived at `begun`. `resets` and `frames` are the sizes of the two budgets, `block` the most bytes
    /// of received trailers in frames.
    pub fn new(wire: ClientIo, begun: Instant, resets: u32, frames: u32, block: usize) -> Self {
        let now = Instant::now();
        Self {
            wire: RefCell::new(wire),
            written: RefCell::default(),
            response_written: Notify::new(),
            large: RefCell::new(LargeBlocks::new(block)),
            resets: RefCell::new(FrameBudget::new(resets, RESETS, now)),
            refused: RefCell::default(),
            turn: Cell::new(0),
            is_taken: Cell::new(false),
            is_unfinished: Cell::new(false),
            frames: RefCell::new(FrameBudget::new(frames, FRAMES, now)),
            last_content: Cell::new(now),
            last_received: Cell::new(now),
            unfinished: UnfinishedHead::new(begun),
            over: Cell::new(None),
            ended_notify: Notify::new(),
        }
    }

    /// The connection itself; the caller must release the borrow before anyone else needs it.
    pub fn wire(&self) -> &RefCell<ClientIo> {
        &self.wire
    }

    pub fn into_wire(self) -> ClientIo {
        self.wire.into_inner()
    }

    /// Records a received frame. Returns false if the budget is exceeded and the connection has to end.
    pub fn received(&self, frame: FrameHead, now: Instant) -> bool {
        self.last_received.set(now);
        self.is_taken.set(false);
        self.turn.set(self.turn.get() + 1);
        self.refused.borrow_mut().received(frame);
        self.large.borrow_mut().note(frame);
        let carries = match frame.kind {
            kind::HEADERS => true,
            kind::DATA => frame.length > 0 || frame.flags & END_STREAM != 0,
            _ => false,
        };
        let mut frames = self.frames.borrow_mut();
        if carries {
            self.last_content.set(now);
            frames.earn(EXPLAINED);
            return true;
        }
        frames.spend(now) || self.end("frames")
    }

    /// h2 asks for more bytes: it has taken every frame that it could read.
    pub fn asked(&self) {
        self.is_taken.set(true);
    }

    /// Whether the streams should run before more is read.
    pub fn turn_is_over(&self) -> bool {
        self.turn.get() >= TURN
    }

    /// h2 has accepted a request.
    pub fn accepted(&self) {
        self.refused.borrow_mut().accepted();
    }

    /// h2 has no further request for now, and the streams run next.
    pub fn next_turn(&self) {
        self.turn.set(0);
        if self.is_taken.get() {
            let refused = self.refused.borrow_mut().more(self.is_unfinished.get());
            for _ in 0..refused {
                self.reset();
            }
        }
    }

    /// Everything that has arrived has been read.
    pub fn all_read(&self) {
        self.unfinished.all_read();
    }

    /// Something has been read. Records which part the client has begun and not completed.
    pub fn note_unfinished(&self, part: Option<u64>, now: Instant) {
        self.is_unfinished.set(part.is_some());
        self.unfinished.note(part, now);
    }

    /// Resolves when the client has taken this long for a head or another part that nothing may interrupt. Cancel-safe.
    pub async fn overdue(&self, limit: Duration) {
        let has_unread = || socket::receive_queue(self.wire.borrow().tcp()).is_ok_and(|bytes| bytes > 0);
        self.unfinished.overdue(limit, has_unread).await;
    }

    /// Records a written frame.
    pub fn sent(&self, frame: FrameHead, now: Instant) {
        match frame.kind {
            kind::DATA => {
                self.last_content.set(now);
                self.frames.borrow_mut().earn(EXPLAINED);
                if let Some(written) = self.written.borrow_mut().get_mut(&frame.stream) {
                    written.bytes += frame.length as u64;
                }
                self.response_written.notify_waiters();
            }
            kind::HEADERS => {
                self.last_content.set(now);
                if let Some(written) = self.written.borrow_mut().get_mut(&frame.stream) {
                    written.heads += 1;
                }
                self.response_written.notify_waiters();
            }
            _ => {}
        }
    }

    /// Records that a request was reset before it was answered, by the client or by h2.
    pub fn reset(&self) {
        if !self.resets.borrow_mut().spend(Instant::now()) {
            self.end("resets");
        }
    }

    /// Tells the connection to end. Always returns false.
    pub fn end(&self, reason: &'static str) -> bool {
        if self.over.get().is_none() {
            self.over.set(Some(reason));
            self.ended_notify.notify_one();
        }
        false
    }

    /// The reason why the connection has to end, if it has to.
    pub fn over(&self) -> Option<&'static str> {
        self.over.get()
    }

    /// Resolves with the reason when the connection has to end. Cancel-safe.
    pub async fn ended(&self) -> &'static str {
        loop {
            if let Some(reason) = self.over.get() {
                return reason;
            }
            self.ended_notify.notified().await;
        }
    }

    /// Starts to count the written bytes of this stream.
    pub fn open(&self, stream: u32) {
        self.written.borrow_mut().insert(stream, Written::default());
    }

    pub fn close(&self, stream: u32) {
        self.written.borrow_mut().remove(&stream);
    }

    /// Time of the last frame with message content, in either direction.
    pub fn last_content(&self) -> Instant {
        self.last_content.get()
    }

    /// Time of the last frame received.
    pub fn last_received(&self) -> Instant {
        self.last_received.get()
    }

    /// Bytes that the client has acknowledged, over all streams.
    pub fn acknowledged(&self) -> io::Result<u64> {
        socket::bytes_acked(self.wire.borrow().tcp())
    }

    /// Bytes that the client has not acknowledged.
    pub fn queued(&self) -> io::Result<u32> {
        socket::send_queue(self.wire.borrow().tcp())
    }

    /// Starts to watch this stream, which waits for its client and has been given `sent` bytes of its response.
    pub fn watch(&self, stream: u32, sent: u64, limit: Duration) -> io::Result<Stall> {
        let acked = self.acknowledged()?;
        let position = acked + u64::from(self.queued()?);
        let written = self.written_of(stream);
        Ok(Stall { stream, sent, limit, written, position, acked, since: Instant::now() })
    }

    fn written_of(&self, stream: u32) -> u64 {
        self.written.borrow().get(&stream).copied().unwrap_or_default().bytes
    }

    /// Resolves when this many heads and bytes of this stream's response have been written. Cancel-safe.
    pub async fn written(&self, stream: u32, heads: u64, bytes: u64) {
        let is_written = |written: &Written| written.heads >= heads && written.bytes >= bytes;
        loop {
            let more = self.response_written.notified();
            if self.written.borrow().get(&stream).is_some_and(is_written) {
                return;
            }
            more.await;
        }
    }

    /// Whether fields may be missing from the head or the trailers that this stream received.
    pub fn lacks_fields(&self, stream: u32) -> bool {
        self.large.borrow().contains(stream)
    }
}

/// A stream that waits for its client. The client controls the stream's windows and the connection that all streams
/// share; the stream stalls if neither lets a byte of it proceed.
pub struct Stall {
    stream: u32,
    sent: u64,
    limit: Duration,
    written: u64,
    /// Upper bound of the connection offset where the stream's written bytes end.
    position: u64,
    acked: u64,
    since: Instant,
}

impl Stall {
    /// Checks for progress. Returns `TimedOut` if the stream made none for the whole limit.
    pub fn look(&mut self, traffic: &Traffic) -> io::Result<()> {
        let (now, written, acked) = (Instant::now(), traffic.written_of(self.stream), traffic.acknowledged()?);
        let on_its_way = self.sent > written || acked < self.position;
        if written != self.written {
            self.written = written;
            self.position = acked + u64::from(traffic.queued()?);
            self.since = now;
        } else if on_its_way && acked != self.acked {
            self.since = now;
        } else if now.duration_since(self.since) >= self.limit {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.acked = acked;
        Ok(())
    }
}
