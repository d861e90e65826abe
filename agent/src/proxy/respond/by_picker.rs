//! Delivers a response whose body the EPP answers for (`response_to_picker = "body"`): the client gets what the EPP returns.
//!
//! The endpoint is read as fast as the EPP takes its body and the client takes the answers. The head is held until the EPP replies to
//! it or answers for the body, a body with a length within a limit until it is complete, so that it goes out with its right length, and
//! as it was if the EPP left it unchanged. If the EPP fails, a pool that fails open continues with what the EPP has not answered, if that is known; otherwise the response is broken off.

mod held;
mod out;
mod trailing;

use std::{cell::RefCell, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use penstock_common::path::Path;

use self::{
    held::{HeldBody, HeldHead},
    out::{OutQueue, write},
};
use super::{
    carry::{Aborted, Carried, aborted, frame},
    head::{apply_reply, rename},
};
use crate::{
    budget::Budget,
    client::Client,
    config::FailureMode,
    deadline,
    deliver::{End, Sink},
    endpoint::body::{Piece, ResponseBody},
    http::{fields, response::ResponseHead},
    kernel::socket::monotonic_ns,
    metrics::PoolMetrics,
    picker::{
        client::{Heard, PickStream, ResponseReply},
        message,
        returned::{Answer, DroppedCopy, Returned, UnusableAnswer},
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
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How long the EPP may take for the reply to the trailers after it has answered for the whole body. EPPs that never reply exist.
const TRAILERS_REPLY: Duration = Duration::from_secs(1);
/// How long an EPP that was sent trailers may owe replies to the body: one that ignores trailers does not learn that the body has ended.
const LAST_REPLIES: Duration = Duration::from_secs(30);

/// A body on its way from the endpoint over the EPP to the client.
struct Passage<'a> {
    worker: &'a Worker,
    request: &'a Request,
    head: &'a mut ResponseHead,
    held_head: HeldHead,
    body: &'a mut ResponseBody,
    /// `None` if the EPP answers no more: what comes goes out as it is.
    stream: &'a mut Option<PickStream>,
    tee: &'a RefCell<Tee>,
    returned: Returned,
    rename: Option<Rename>,
    out: &'a OutQueue,
    /// The trailers read so far, and all of them at the end of the endpoint's body.
    section: BytesMut,
    trailers: Option<HeaderMap>,
    /// The EPP wants nothing of the body: what comes goes out as it is, though its stream goes on.
    declined: bool,
    /// The EPP was sent the trailers, and its reply ends the response.
    shown: bool,
    /// The EPP replaced the body with its reply to the head. The endpoint's is read for its trailers alone.
    replaced: bool,
    /// The endpoint broke its response off.
    broken: bool,
    /// The end has been put into `out`.
    ended: bool,
    /// While the body is held.
    held: Option<HeldBody>,
    memory: &'a Arc<Budget>,
    failure_mode: FailureMode,
    metrics: &'a PoolMetrics,
    idle: Option<Duration>,
    account: Account,
}

/// Why a passage ended before its end.
enum PassageStop {
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
    let out = OutQueue::default();
    let pool = &worker.shared.config.pools[request.pool];
    let memory = &worker.shared.bodies.memory;
    let awaits = stream.as_ref().is_some_and(PickStream::awaits_head_reply);
    let held = HeldBody::of(head, limit);
    let mut passage = Passage {
        worker,
        request,
        head,
        held_head: if awaits { HeldHead::Awaited } else { HeldHead::Settled },
        body,
        stream,
        tee,
        returned: Returned::new(limit, memory),
        rename,
        out: &out,
        section: BytesMut::new(),
        trailers: None,
        declined: false,
        shown: false,
        replaced: false,
        broken: false,
        ended: false,
        held,
        memory,
        failure_mode: pool.failure_mode,
        metrics: worker.shared.metrics.pool(request.pool),
        idle: request.timeouts.idle,
        account: Account::default(),
    };
    let (mut begun, mut keep_alive) = (false, false);
    let end = async {
        passage.hold(client).await?;
        passage.release();
        begun = true;
        let (lead, coding, keeps) =
            frame(worker, client, request, passage.head, false).map_err(|_| PassageStop::End(End::ClientGone))?;
        keep_alive = keeps;
        let mut to = Sink { client, lead, coding };
        let write = write(&mut to, &out);
        tokio::select! {
            biased;
            end = write => end.map_err(PassageStop::End),
            stop = passage.run() => Err(stop),
        }
    };
    // The passage hears of an eviction.
    let mut no_stream = None;
    let end = tokio::select! {
        biased;
        end = end => end,
        why = aborted(worker, request, request.deadline.at, &mut no_stream, None) => Err(PassageStop::Aborted(why)),
    };
    let end = match end {
        Ok(()) => Ok(End::Complete { reusable: passage.trailers.is_some() && passage.body.is_reusable() }),
        Err(PassageStop::End(end)) => Ok(end),
        Err(PassageStop::Aborted(why)) => Err(why),
    };
    Carried { end, account: passage.account, path: Path::Relay, reason: SteerReason::PickerBody, keep_alive, begun }
}

/// What the EPP says; nothing any more without a stream.
async fn heard(stream: &mut Option<PickStream>) -> Heard {
    match stream {
        Some(stream) => stream.heard().await,
        None => std::future::pending().await,
    }
}

impl Passage<'_> {
    /// Runs while the response is held: the head until the EPP says something, the body until it is complete or exceeds the limit.
    async fn hold(&mut self, client: &mut Client) -> Result<(), PassageStop> {
        let owes = |stream: &PickStream| stream.has_failed() && !stream.replaces_body();
        if self.stream.as_ref().is_some_and(owes) {
            self.lost(false)?;
        }
        while (self.held.is_some() || self.held_head == HeldHead::Awaited) && !self.ended {
            if self.broken && self.returned.is_answered() {
                return Err(PassageStop::End(End::Broken));
            }
            tokio::select! {
                biased;
                step = self.step() => step?,
                () = client.gone() => return Err(PassageStop::End(End::ClientGone)),
            }
        }
        Ok(())
    }

    /// Makes the head fit what goes out.
    fn release(&mut self) {
        self.held_head = HeldHead::Settled;
        if let Some(stream) = self.stream {
            stream.settle_head();
        }
        let Some(held) = self.held.take() else { return self.head.change_body() };
        if self.replaced || held.differs() {
            self.head.change_body();
            self.head.set_length(self.out.bytes.get() as u64);
        }
    }

    /// Whether the EPP answers for what is still to come.
    fn is_asked(&self) -> bool {
        self.stream.is_some() && !self.declined
    }

    /// Runs until something ends the response early.
    async fn run(&mut self) -> PassageStop {
        loop {
            if self.broken && (!self.is_asked() || self.returned.is_answered()) {
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
    async fn step(&mut self) -> Result<(), PassageStop> {
        let waiting = if self.held.is_some() { 0 } else { self.out.bytes.get() };
        let unsent = self.stream.as_ref().is_some_and(PickStream::has_unsent);
        let reads = self.trailers.is_none() && !self.broken && waiting < WAITING && !unsent;
        let listens = waiting < WAITING_MOST;
        let at_most = |limit: Duration| self.idle.map_or(limit, |idle| idle.min(limit));
        let trailers_reply = at_most(TRAILERS_REPLY);
        let last_replies = if self.shown { Some(at_most(LAST_REPLIES)) } else { self.idle };
        tokio::select! {
            biased;
            heard = heard(self.stream), if listens => self.heard(heard),
            piece = self.body.next(&mut self.section), if reads => match piece {
                Ok(piece) => self.read(piece),
                Err(error) => {
                    tracing::debug!(%error, "endpoint aborted its response");
                    // The client gets what came before.
                    self.broken = self.held.is_none();
                    if self.broken { Ok(()) } else { Err(PassageStop::End(End::Broken)) }
                }
            },
            () = deadline::elapsed(Some(LAST_ANSWERS)), if self.broken && waiting < WAITING_MOST => {
                self.break_off();
                Ok(())
            }
            () = self.out.taken.notified(), if waiting > 0 => Ok(()),
            () = deadline::elapsed(Some(trailers_reply)), if listens && !unsent && self.owes_trailers_alone() => {
                tracing::warn!("EPP did not reply to trailers in time, it is sent none for a while");
                self.note_trailers(false);
                self.end();
                Ok(())
            }
            // A client that takes nothing has its own limit.
            () = deadline::elapsed(self.idle), if waiting == 0 && reads => Err(PassageStop::End(End::Idle)),
            () = deadline::elapsed(last_replies), if waiting == 0 && !reads => {
                tracing::warn!("EPP did not answer for a response body in time");
                self.note_trailers(false);
                self.lost(false)
            }
        }
    }

    fn heard(&mut self, heard: Heard) -> Result<(), PassageStop> {
        if !matches!(heard, Heard::Sent | Heard::Head(_)) {
            self.nothing_awaited();
        }
        match heard {
            Heard::Sent => Ok(()),
            Heard::Head(reply) => {
                self.change_head(&reply);
                Ok(())
            }
            Heard::Declined => self.declined(),
            Heard::Evicted(reply) => Err(PassageStop::Aborted(Aborted::Evicted(reply))),
            Heard::Closed => self.lost(true),
            Heard::Failed => self.lost(false),
            // For a piece that was on its way when the EPP declined: it has gone out.
            Heard::Answer(_) if self.declined => Ok(()),
            Heard::Answer(answer) => {
                self.replaced |= matches!(answer, Answer::Whole(_));
                let out = self.returned.answer(answer).map_err(|why| self.unusable(why))?;
                self.put(&out);
                let waits = self.shown || self.replaced && self.trailers.is_none();
                if self.returned.is_done() && !waits {
                    self.end();
                }
                Ok(())
            }
            // Replies to nothing, too.
            Heard::Trailers(change) => {
                if self.shown {
                    self.note_trailers(true);
                    self.change_trailers(change.as_ref())
                } else {
                    Ok(())
                }
            }
        }
    }

    /// The head need not be held any more.
    fn nothing_awaited(&mut self) {
        if self.held_head == HeldHead::Awaited {
            self.held_head = HeldHead::Unanswered;
        }
    }

    /// Applies the EPP's reply to the head, unless that is settled.
    fn change_head(&mut self, reply: &ResponseReply) {
        let before = std::mem::replace(&mut self.held_head, HeldHead::Settled);
        if before == HeldHead::Settled {
            return;
        }
        apply_reply(self.worker, self.request, self.head, reply);
        self.request.apply_grant(&self.worker.shared.config, &mut self.head.headers);
        if before == HeldHead::Awaited {
            // Nothing of the body has gone through it.
            self.rename = rename(self.request, self.head);
        }
    }

    /// Takes a piece of the endpoint's body.
    fn read(&mut self, piece: Piece) -> Result<(), PassageStop> {
        let rest = match piece {
            Piece::Data(data) => {
                let now = monotonic_ns();
                self.account.stamp(now, now);
                self.account.add_relayed(data.len());
                if self.replaced {
                    return Ok(());
                }
                if let Some(held) = &mut self.held {
                    held.original(&data);
                }
                self.tee.borrow_mut().take(&data);
                loop {
                    let next = self.tee.borrow_mut().next_piece();
                    let Some(next) = next else { return Ok(()) };
                    self.send(next, false);
                }
            }
            Piece::End(mut trailers) => {
                fields::filter_trailers(&mut trailers);
                self.trailers = Some(trailers);
                if self.replaced {
                    self.end();
                    return Ok(());
                }
                self.tee.borrow_mut().rest().pieces
            }
        };
        self.send_last(rest);
        Ok(())
    }

    /// Sends the rest of the body and the trailers. An EPP that does not reply to trailers is sent the body's end alone.
    fn send_last(&mut self, rest: Vec<Bytes>) {
        let replies = |stream: &PickStream| stream.replies_to_trailers() && !stream.replaces_body();
        let replies = self.is_asked() && self.stream.as_ref().is_some_and(replies);
        let trailers = self.trailers.as_ref().filter(|trailers| !trailers.is_empty() && replies).cloned();
        let last = rest.len();
        for (number, piece) in (1..).zip(rest) {
            self.send(piece, number == last && trailers.is_none());
        }
        let is_asked = self.is_asked();
        match (self.stream.as_mut().filter(|_| is_asked), trailers) {
            (None, _) => self.end(),
            (Some(stream), Some(trailers)) => {
                stream.give_trailers(&trailers);
                self.shown = true;
            }
            (Some(_), None) if last == 0 => self.send(Bytes::new(), true),
            (Some(_), None) => {}
        }
    }

    /// Sends a piece to the EPP, or past it.
    fn send(&mut self, mut piece: Bytes, end: bool) {
        let is_asked = self.is_asked();
        let Some(stream) = self.stream.as_mut().filter(|_| is_asked) else { return self.put(&piece) };
        loop {
            let message = piece.split_to(piece.len().min(message::PIECE));
            let last = piece.is_empty();
            match self.returned.sent(&message, end && last) {
                Some(DroppedCopy::Limit) => self.metrics.epp_body_copy_dropped("limit"),
                Some(DroppedCopy::Memory) => self.metrics.epp_body_copy_dropped("memory"),
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
            held.returned(&piece);
        }
        self.out.add(piece);
    }

    /// The EPP wants nothing of the body, and leaves it unchanged.
    fn declined(&mut self) -> Result<(), PassageStop> {
        let Some(rest) = self.returned.rest() else { return Err(self.broken_off()) };
        self.declined = true;
        self.pass(&rest);
        Ok(())
    }

    /// What the EPP was sent and has not answered goes out as it is, and so does what comes.
    fn pass(&mut self, rest: &[Bytes]) {
        for piece in rest {
            self.put(piece);
        }
        if self.trailers.is_some() {
            self.end();
        }
    }

    /// The EPP ended the stream, with status OK (`clean`) or not, or does not answer.
    fn lost(&mut self, clean: bool) -> Result<(), PassageStop> {
        self.nothing_awaited();
        if self.replaced || self.declined {
            // It owes nothing.
            *self.stream = None;
            return Ok(());
        }
        if !clean {
            self.metrics.epp_failed("response_unanswered");
        }
        let rest = if clean || self.failure_mode == FailureMode::Open { self.returned.rest() } else { None };
        let Some(rest) = rest else { return Err(self.broken_off()) };
        self.metrics.epp_body_unanswered("continued");
        // Its stream must not end as if it had got the whole body.
        *self.stream = None;
        self.pass(&rest);
        Ok(())
    }

    fn unusable(&self, why: UnusableAnswer) -> PassageStop {
        tracing::warn!(?why, "EPP's answers for a response body cannot be obeyed, breaking the response off");
        self.broken_off()
    }

    fn broken_off(&self) -> PassageStop {
        self.metrics.epp_body_unanswered("broken_off");
        PassageStop::Aborted(Aborted::PickerFailed)
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
