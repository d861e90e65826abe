//! Delivers a response whose body the EPP answers for (`response_to_picker = "body"`): the client gets what the EPP returns.
//!
//! The endpoint is read as fast as the EPP takes its body and the client takes the answers. A body with a length is held within a
//! limit until it is complete, so that it goes out with its right length, and as it was if the EPP left it unchanged. If the EPP
//! fails, a pool that fails open continues with what the EPP has not answered, if that is known; otherwise the response is broken off.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use penstock_common::path::Path;
use ring::digest;
use tokio::sync::Notify;

use super::carry::{Aborted, Carried, aborted, frame};
use crate::{
    budget::Budget,
    client::Client,
    config::FailureMode,
    deadline,
    deliver::{End, Sink},
    endpoint::body::{Piece, ResponseBody},
    http::response::{BodyKind, ResponseHead},
    kernel::socket::monotonic_ns,
    metrics::PoolMetrics,
    picker::{
        client::{Heard, PickStream},
        message,
        returned::{Dropped, Returned, Unusable},
    },
    proxy::request::Request,
    rename::Rename,
    steer::{account::Account, reason::SteerReason},
    tee::Tee,
    worker::Worker,
};

/// While more bytes than this wait for the client, the endpoint is not read.
const WAITING: usize = 64 << 10;
/// While more bytes than this wait for the client, the EPP is not read, and an eviction has to wait, too.
const WAITING_MOST: usize = 256 << 10;

/// How long the EPP may take for each answer after the endpoint broke off.
const LAST_ANSWERS: std::time::Duration = std::time::Duration::from_secs(1);

/// What waits for the client.
#[derive(Default)]
struct Out {
    pieces: RefCell<VecDeque<Bytes>>,
    bytes: Cell<usize>,
    /// Set at the end of the body.
    end: RefCell<Option<Result<HeaderMap, End>>>,
    /// Something was added, or taken.
    added: Notify,
    taken: Notify,
}

/// A body on its way from the endpoint over the EPP to the client.
struct Passage<'a> {
    body: &'a mut ResponseBody,
    /// `None` if the EPP answers no more: what comes goes out as it is.
    stream: &'a mut Option<PickStream>,
    tee: &'a RefCell<Tee>,
    returned: Returned,
    rename: Option<Rename>,
    out: &'a Out,
    /// The trailers read so far, and all of them at the end of the endpoint's body.
    section: BytesMut,
    trailers: Option<HeaderMap>,
    /// The endpoint broke its response off.
    broken: bool,
    /// The end has been put into `out`.
    ended: bool,
    /// While the response is held.
    held: Option<Held>,
    memory: &'a Arc<Budget>,
    failure_mode: FailureMode,
    metrics: &'a PoolMetrics,
    idle: Option<std::time::Duration>,
    account: Account,
}

/// What tells whether the EPP left the body as it was.
struct Held {
    original: digest::Context,
    returned: digest::Context,
    limit: usize,
}

/// Why a passage ended before its end.
enum Stop {
    End(End),
    Aborted(Aborted),
}

/// Delivers the response, of which at most `limit` bytes are kept.
#[expect(clippy::too_many_arguments, reason = "the parts of one response, each borrowed separately")]
pub(super) async fn deliver(
    worker: &Worker,
    client: &mut Client,
    request: &Request,
    head: &mut ResponseHead,
    body: &mut ResponseBody,
    stream: &mut Option<PickStream>,
    tee: &RefCell<Tee>,
    rename: Option<Rename>,
    limit: usize,
) -> Carried {
    let out = Out::default();
    let pool = &worker.shared.config.pools[request.pool];
    let memory = &worker.shared.bodies.memory;
    let mut passage = Passage {
        body,
        stream,
        tee,
        returned: Returned::new(limit, memory),
        rename,
        out: &out,
        section: BytesMut::new(),
        trailers: None,
        broken: false,
        ended: false,
        held: holds(head, limit),
        memory,
        failure_mode: pool.failure_mode,
        metrics: worker.shared.metrics.pool(request.pool),
        idle: request.timeouts.idle,
        account: Account::default(),
    };
    let (mut begun, mut keep_alive) = (false, false);
    let end = async {
        passage.hold(client).await?;
        passage.release(head);
        begun = true;
        let (lead, coding, keeps) =
            frame(worker, client, request, head, false).map_err(|_| Stop::End(End::ClientGone))?;
        keep_alive = keeps;
        let mut to = Sink { client, lead, coding };
        let write = write(&mut to, &out);
        tokio::select! {
            biased;
            end = write => end.map_err(Stop::End),
            stop = passage.run() => Err(stop),
        }
    };
    // The passage hears of an eviction.
    let mut no_stream = None;
    let end = tokio::select! {
        biased;
        end = end => end,
        why = aborted(worker, request, request.deadline.at, &mut no_stream, None) => Err(Stop::Aborted(why)),
    };
    let end = match end {
        Ok(()) => Ok(End::Complete { reusable: passage.trailers.is_some() && passage.body.is_reusable() }),
        Err(Stop::End(end)) => Ok(end),
        Err(Stop::Aborted(why)) => Err(why),
    };
    Carried { end, account: passage.account, path: Path::Relay, reason: SteerReason::PickerBody, keep_alive, begun }
}

/// A body with a length within the limit is held, except for an event stream.
fn holds(head: &ResponseHead, limit: usize) -> Option<Held> {
    let BodyKind::Length(length) = head.body else { return None };
    let fits = !head.is_event_stream() && length <= limit as u64;
    let digest = || digest::Context::new(&digest::SHA256);
    fits.then(|| Held { original: digest(), returned: digest(), limit })
}

/// What the EPP says; nothing any more without a stream.
async fn heard(stream: &mut Option<PickStream>) -> Heard {
    match stream {
        Some(stream) => stream.heard().await,
        None => std::future::pending().await,
    }
}

/// Writes what the passage puts out, to its end.
async fn write(to: &mut Sink<'_>, out: &Out) -> Result<(), End> {
    to.begin().await?;
    loop {
        let next = out.pieces.borrow_mut().pop_front();
        if let Some(piece) = next {
            out.bytes.set(out.bytes.get() - piece.len());
            out.taken.notify_one();
            to.data(piece).await?;
            continue;
        }
        let end = out.end.borrow_mut().take();
        match end {
            Some(Ok(trailers)) => return to.end(trailers).await,
            Some(Err(end)) => return Err(end),
            None => {}
        }
        tokio::select! {
            biased;
            () = out.added.notified() => {}
            () = to.client.gone() => return Err(End::ClientGone),
        }
    }
}

impl Out {
    fn add(&self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes.set(self.bytes.get() + piece.len());
            self.pieces.borrow_mut().push_back(piece);
            self.added.notify_one();
        }
    }

    fn end(&self, end: Result<HeaderMap, End>) {
        self.end.replace(Some(end));
        self.added.notify_one();
    }
}

impl Passage<'_> {
    /// Runs while the response is held, until it is complete or exceeds the limit.
    async fn hold(&mut self, client: &mut Client) -> Result<(), Stop> {
        if let Some(stream) = self.stream {
            stream.obey();
            if stream.has_failed() {
                self.lost(false)?;
            }
        }
        while self.held.is_some() && !self.ended {
            tokio::select! {
                biased;
                step = self.step() => step?,
                () = client.gone() => return Err(Stop::End(End::ClientGone)),
            }
        }
        Ok(())
    }

    /// Makes the head fit what goes out.
    fn release(&mut self, head: &mut ResponseHead) {
        let Some(held) = self.held.take() else { return head.change_body() };
        if held.original.finish().as_ref() != held.returned.finish().as_ref() {
            head.change_body();
            head.set_length(self.out.bytes.get() as u64);
        }
    }

    /// Runs until something ends the response early.
    async fn run(&mut self) -> Stop {
        loop {
            if self.broken && (self.stream.is_none() || self.returned.is_answered()) {
                self.break_off();
            }
            if self.ended {
                return std::future::pending().await;
            }
            if let Err(stop) = self.step().await {
                return stop;
            }
        }
    }

    /// Takes the next event of the endpoint, the EPP or the client. Cancel-safe.
    async fn step(&mut self) -> Result<(), Stop> {
        let waiting = if self.held.is_some() { 0 } else { self.out.bytes.get() };
        let unsent = self.stream.as_ref().is_some_and(PickStream::has_unsent);
        let reads = self.trailers.is_none() && !self.broken && waiting < WAITING && !unsent;
        let listens = waiting < WAITING_MOST;
        tokio::select! {
            biased;
            heard = heard(self.stream), if listens => self.heard(heard),
            piece = self.body.next(&mut self.section), if reads => match piece {
                Ok(piece) => self.read(piece),
                Err(error) => {
                    tracing::debug!(%error, "endpoint aborted its response");
                    // The client gets what came before.
                    self.broken = self.held.is_none();
                    if self.broken { Ok(()) } else { Err(Stop::End(End::Broken)) }
                }
            },
            () = deadline::elapsed(Some(LAST_ANSWERS)), if self.broken && waiting < WAITING_MOST => {
                self.break_off();
                Ok(())
            }
            () = self.out.taken.notified(), if waiting > 0 => Ok(()),
            // A client that takes nothing has its own limit.
            () = deadline::elapsed(self.idle), if waiting == 0 && reads => Err(Stop::End(End::Idle)),
            () = deadline::elapsed(self.idle), if waiting == 0 && !reads => {
                tracing::warn!("EPP did not answer for a response body in time");
                self.lost(false)
            }
        }
    }

    fn heard(&mut self, heard: Heard) -> Result<(), Stop> {
        match heard {
            Heard::Sent => Ok(()),
            Heard::Evicted(reply) => Err(Stop::Aborted(Aborted::Evicted(reply))),
            Heard::Closed => self.lost(true),
            Heard::Failed => self.lost(false),
            Heard::Answer(answer) => {
                let out = self.returned.answer(answer).map_err(|why| self.unusable(why))?;
                self.put(&out);
                if self.returned.is_done() {
                    self.end();
                }
                Ok(())
            }
        }
    }

    /// Takes a piece of the endpoint's body.
    fn read(&mut self, piece: Piece) -> Result<(), Stop> {
        let rest = match piece {
            Piece::Data(data) => {
                let now = monotonic_ns();
                self.account.stamp(now, now);
                self.account.add_relayed(data.len());
                if let Some(held) = &mut self.held {
                    held.original.update(&data);
                }
                self.tee.borrow_mut().take(&data);
                loop {
                    let next = self.tee.borrow_mut().next_piece();
                    let Some(next) = next else { return Ok(()) };
                    self.send(next, false);
                }
            }
            Piece::End(trailers) => {
                self.trailers = Some(trailers);
                self.tee.borrow_mut().rest().pieces
            }
        };
        let last = rest.len();
        for (number, piece) in (1..).zip(rest) {
            self.send(piece, number == last);
        }
        if last == 0 {
            self.send(Bytes::new(), true);
        }
        if self.stream.is_none() {
            self.end();
        }
        Ok(())
    }

    /// Sends a piece to the EPP, or past it.
    fn send(&mut self, mut piece: Bytes, end: bool) {
        let Some(stream) = self.stream else { return self.put(&piece) };
        loop {
            let message = piece.split_to(piece.len().min(message::PIECE));
            let last = piece.is_empty();
            match self.returned.sent(&message, end && last) {
                Some(Dropped::Limit) => self.metrics.epp_body_copy_dropped("limit"),
                Some(Dropped::Memory) => self.metrics.epp_body_copy_dropped("memory"),
                None => {}
            }
            stream.give_response(message, end && last);
            if last {
                return;
            }
        }
    }

    /// What goes out.
    fn put(&mut self, piece: &Bytes) {
        let piece = match &mut self.rename {
            Some(rename) => rename.feed(piece),
            None => piece.clone(),
        };
        self.add(piece);
    }

    /// Counts the piece until it is written. Beyond the limit, or without memory for more, the response is not held any more.
    fn add(&mut self, piece: Bytes) {
        let fits = self.held.as_ref().is_none_or(|held| self.out.bytes.get() + piece.len() <= held.limit);
        let counted = self.memory.hold(piece);
        if !fits || counted.is_err() {
            self.held = None;
        }
        let piece = counted.unwrap_or_else(|uncounted| uncounted);
        if let Some(held) = &mut self.held {
            held.returned.update(&piece);
        }
        self.out.add(piece);
    }

    /// The EPP ended the stream, with status OK (`clean`) or not, or does not answer.
    fn lost(&mut self, clean: bool) -> Result<(), Stop> {
        if !clean {
            self.metrics.epp_failed("response_unanswered");
        }
        let rest = if clean || self.failure_mode == FailureMode::Open { self.returned.rest() } else { None };
        let Some(rest) = rest else { return Err(self.broken_off()) };
        self.metrics.epp_body_unanswered("continued");
        // Its stream must not end as if it had got the whole body.
        *self.stream = None;
        for piece in rest {
            self.put(&piece);
        }
        if self.trailers.is_some() {
            self.end();
        }
        Ok(())
    }

    fn unusable(&self, why: Unusable) -> Stop {
        tracing::warn!(?why, "EPP's answers for a response body cannot be obeyed, breaking the response off");
        self.broken_off()
    }

    fn broken_off(&self) -> Stop {
        self.metrics.epp_body_unanswered("broken_off");
        Stop::Aborted(Aborted::PickerFailed)
    }

    fn end(&mut self) {
        if let Some(rename) = &mut self.rename {
            let rest = rename.end();
            self.add(rest);
        }
        self.ended = true;
        // The EPP may end the body before the endpoint does.
        self.out.end(Ok(self.trailers.clone().unwrap_or_default()));
    }

    fn break_off(&mut self) {
        self.ended = true;
        self.out.end(Err(End::Broken));
    }
}
