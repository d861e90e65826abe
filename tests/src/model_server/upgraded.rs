//! A switched connection: bytes in both directions, each checked by its receiver.

use std::future::pending;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::sleep;

use super::Shared;
use super::connection::{Connection, Stop};
use super::plan::{After, FaultKind, Plan, Upgraded};
use super::sequence::Sequence;
use crate::client::ConnectionEnd;
use crate::content::{Checker, Fnv, Mismatch};
use crate::random::Random;

/// What a peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub length: u64,
    /// FNV-1a.
    pub hash: u64,
    pub end: ConnectionEnd,
}

/// The part of the announced stream that a peer has sent so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upload {
    /// Bytes that matched.
    pub right: u64,
    /// The first byte that differed. Later bytes are not compared.
    pub wrong: Option<Mismatch>,
    /// How the stream ended, once it has.
    pub end: Option<ConnectionEnd>,
}

/// Compares received bytes with the stream named by the plan, if any.
struct Watch<'a> {
    stream: Option<(u64, Checker)>,
    shared: &'a Shared,
}

impl<'a> Watch<'a> {
    fn new(plan: &Plan, shared: &'a Shared) -> Self {
        let stream = plan.upload.map(|id| (id, Checker::of(plan.alphabet, id)));
        Self { stream, shared }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let Some((id, checker)) = &mut self.stream else { return };
        let mut uploads = self.shared.uploads.lock();
        let upload = uploads.entry(*id).or_default();
        if upload.wrong.is_none() {
            upload.wrong = checker.feed(bytes).err();
            upload.right = checker.offset();
        }
    }

    fn end(&self, end: ConnectionEnd) {
        if let Some((id, _)) = &self.stream {
            self.shared.uploads.lock().entry(*id).or_default().end = Some(end);
        }
    }
}

/// `first` is sent in one write with the first bytes.
pub(super) async fn respond(
    connection: &mut Connection,
    plan: &Plan,
    upgraded: Upgraded,
    first: Vec<u8>,
) -> Result<After, Stop> {
    let shared = std::sync::Arc::clone(&connection.shared);
    let early = std::mem::take(&mut connection.buffer);
    let watch = Watch::new(plan, &shared);
    let (mut from, mut to) = connection.stream.split();
    let done = match upgraded {
        Upgraded::Echo => {
            to.write_all(&first).await.map_err(|_| Stop::PeerGone)?;
            let received = receive(&mut from, early, Some(&mut to), watch).await;
            shared.received.lock().push(received);
            Ok(received)
        }
        Upgraded::SendLast => {
            to.write_all(&first).await.map_err(|_| Stop::PeerGone)?;
            let received = receive(&mut from, early, None, watch).await;
            shared.received.lock().push(received);
            send(&mut to, plan, Vec::new()).await.map(|()| received)
        }
        Upgraded::Send => {
            let receive = async {
                let received = receive(&mut from, early, None, watch).await;
                shared.received.lock().push(received);
                // The peer is gone, so nothing more can be sent.
                if received.end == ConnectionEnd::Reset { Err(Stop::PeerGone) } else { Ok(received) }
            };
            tokio::try_join!(receive, send(&mut to, plan, first)).map(|(received, ())| received)
        }
    };
    match done?.end {
        ConnectionEnd::Fin => Ok(After::SilentClose),
        ConnectionEnd::Reset => Err(Stop::PeerGone),
    }
}

/// Receives everything and, if echoing, passes it on.
async fn receive(
    from: &mut ReadHalf<'_>,
    early: BytesMut,
    mut echo: Option<&mut WriteHalf<'_>>,
    mut watch: Watch<'_>,
) -> Received {
    let (mut buffer, mut hash, mut length) = (early, Fnv::default(), 0);
    let end = loop {
        hash.update(&buffer);
        watch.bytes(&buffer);
        length += buffer.len() as u64;
        if let Some(echo) = &mut echo
            && echo.write_all(&buffer).await.is_err()
        {
            break ConnectionEnd::Reset;
        }
        buffer.clear();
        buffer.reserve(16 << 10);
        match from.read_buf(&mut buffer).await {
            Ok(0) => break ConnectionEnd::Fin,
            Ok(_) => {}
            Err(_) => break ConnectionEnd::Reset,
        }
    };
    watch.end(end);
    if let (ConnectionEnd::Fin, Some(echo)) = (end, echo) {
        let _ = echo.shutdown().await;
    }
    Received { length, hash: hash.value(), end }
}

/// Sends the plan's bytes and closes, with the plan's writes, pauses and faults.
async fn send(to: &mut WriteHalf<'_>, plan: &Plan, first: Vec<u8>) -> Result<(), Stop> {
    let mut lengths = Sequence::new(plan.writes);
    let mut random = plan.pauses.map(|pauses| Random::new(pauses.seed));
    let (mut at, mut writes) = (0, 0_u64);
    let (mut buffer, mut fault) = (first, plan.fault);
    loop {
        if let Some(due) = fault.take_if(|fault| fault.after == at) {
            to.write_all(&buffer).await.map_err(|_| Stop::PeerGone)?;
            buffer.clear();
            match due.kind {
                FaultKind::Stall | FaultKind::UntilTold | FaultKind::ResetWhenTold => pending::<()>().await,
                FaultKind::StallMs(ms) => sleep(Duration::from_millis(ms)).await,
                FaultKind::Reset => return Err(Stop::Reset),
                FaultKind::Close => return Err(Stop::Close),
            }
        }
        let until = fault.map_or(plan.size, |fault| fault.after.min(plan.size));
        let length = lengths.next().min(until - at);
        let begin = buffer.len();
        buffer.resize(begin + usize::try_from(length).expect("the write exceeds memory"), 0);
        plan.alphabet.fill(plan.stream_id, at, &mut buffer[begin..]);
        to.write_all(&buffer).await.map_err(|_| Stop::PeerGone)?;
        buffer.clear();
        at += length;
        writes += 1;
        if at == plan.size && fault.is_none() {
            return to.shutdown().await.map_err(|_| Stop::PeerGone);
        }
        if let (Some(pauses), Some(random)) = (plan.pauses, &mut random)
            && writes.is_multiple_of(pauses.every.max(1))
        {
            sleep(Duration::from_micros(random.below(pauses.up_to_us.saturating_add(1)))).await;
        }
    }
}
