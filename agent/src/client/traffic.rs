//! What goes over a client's HTTP/2 connection: what of each response has been written, when a stream last moved, and whether
//! the client asks for more than its share. The connection (`connection::http2`) writes it down, its streams read it.

mod budget;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use self::budget::Budget;
use super::wire::Wire;
use crate::{
    http::frame_heads::{END_STREAM, FrameHead, kind},
    kernel::socket,
};

/// The time in which a budget of resets is whole again, and one of frames.
const RESETS: Duration = Duration::from_secs(600);
const FRAMES: Duration = Duration::from_secs(10);
/// Frames without a part of a message that a frame with one explains: a client may open the windows of stream and connection
/// for each DATA frame, and probe what the way takes by PINGs.
const EXPLAINED: u32 = 8;

pub struct Traffic {
    wire: RefCell<Wire>,
    /// Bytes of DATA written, by stream.
    written: RefCell<HashMap<u32, u64>>,
    /// Requests that the client may take back before they are answered.
    resets: RefCell<Budget>,
    /// Frames that carry no part of a message.
    frames: RefCell<Budget>,
    /// When a part of a message last came or went.
    moved: Cell<Instant>,
    /// When anything last came.
    heard: Cell<Instant>,
    over: Cell<Option<&'static str>>,
    told: Notify,
}

impl Traffic {
    /// `resets` and `frames`: how many of either a client may have at once.
    pub fn new(wire: Wire, resets: u32, frames: u32) -> Self {
        let now = Instant::now();
        Self {
            wire: RefCell::new(wire),
            written: RefCell::default(),
            resets: RefCell::new(Budget::new(resets, RESETS, now)),
            frames: RefCell::new(Budget::new(frames, FRAMES, now)),
            moved: Cell::new(now),
            heard: Cell::new(now),
            over: Cell::new(None),
            told: Notify::new(),
        }
    }

    /// The connection itself, for as long as nobody else is asked for it.
    pub fn wire(&self) -> &RefCell<Wire> {
        &self.wire
    }

    pub fn into_wire(self) -> Wire {
        self.wire.into_inner()
    }

    /// A frame has come. False: there are too many of its kind, and the connection is over.
    pub fn received(&self, frame: FrameHead, now: Instant) -> bool {
        self.heard.set(now);
        let carries = match frame.kind {
            kind::HEADERS => true,
            kind::DATA => frame.length > 0 || frame.flags & END_STREAM != 0,
            _ => false,
        };
        let mut frames = self.frames.borrow_mut();
        if carries {
            self.moved.set(now);
            frames.earn(EXPLAINED);
            return true;
        }
        frames.spend(now) || self.end("frames")
    }

    /// A frame has been written.
    pub fn sent(&self, frame: FrameHead, now: Instant) {
        match frame.kind {
            kind::DATA => {
                self.moved.set(now);
                self.frames.borrow_mut().earn(EXPLAINED);
                if let Some(written) = self.written.borrow_mut().get_mut(&frame.stream) {
                    *written += frame.length as u64;
                }
            }
            kind::HEADERS => self.moved.set(now),
            _ => {}
        }
    }

    /// The client has taken a request back before it was answered.
    pub fn reset(&self) {
        if !self.resets.borrow_mut().spend(Instant::now()) {
            self.end("resets");
        }
    }

    /// The connection has to end. False, always.
    pub fn end(&self, reason: &'static str) -> bool {
        if self.over.get().is_none() {
            self.over.set(Some(reason));
            self.told.notify_one();
        }
        false
    }

    /// Why the connection has to end, if so.
    pub fn over(&self) -> Option<&'static str> {
        self.over.get()
    }

    /// Resolves when the connection has to end, with the reason. Cancel-safe.
    pub async fn ended(&self) -> &'static str {
        loop {
            if let Some(reason) = self.over.get() {
                return reason;
            }
            self.told.notified().await;
        }
    }

    /// Counts what is written of this stream's response from now on.
    pub fn open(&self, stream: u32) {
        self.written.borrow_mut().insert(stream, 0);
    }

    pub fn close(&self, stream: u32) {
        self.written.borrow_mut().remove(&stream);
    }

    /// When a part of a message last came or went.
    pub fn moved(&self) -> Instant {
        self.moved.get()
    }

    /// When anything last came.
    pub fn heard(&self) -> Instant {
        self.heard.get()
    }

    /// Bytes that the client has acknowledged, all streams together.
    pub fn acknowledged(&self) -> io::Result<u64> {
        socket::bytes_acked(self.wire.borrow().tcp())
    }

    /// Bytes that it has not.
    pub fn queued(&self) -> io::Result<u32> {
        socket::send_queue(self.wire.borrow().tcp())
    }

    /// Begins to watch a wait of this stream, of whose response `sent` bytes are on their way.
    pub fn watch(&self, stream: u32, sent: u64, limit: Duration) -> io::Result<Stall> {
        let acked = self.acknowledged()?;
        let position = acked + u64::from(self.queued()?);
        let written = self.written_of(stream);
        Ok(Stall { stream, sent, limit, written, position, acked, since: Instant::now() })
    }

    fn written_of(&self, stream: u32) -> u64 {
        self.written.borrow().get(&stream).copied().unwrap_or_default()
    }
}

/// A stream that waits for its client. Its windows are the client's, and so is the connection that all streams share; so it
/// stalls when neither lets a byte of it go on.
pub struct Stall {
    stream: u32,
    sent: u64,
    limit: Duration,
    written: u64,
    /// Where in the connection what has been written of the stream ends, at the latest.
    position: u64,
    acked: u64,
    since: Instant,
}

impl Stall {
    /// Looks again: `TimedOut` if the client has taken nothing of the stream for the whole limit.
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
