//! A connection that has switched protocols: bytes both ways, each of them checked by whoever gets them.

use std::future::pending;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::sleep;

use super::connection::{Connection, Stop};
use super::plan::{After, FaultKind, Plan, Upgraded};
use super::sequence::Sequence;
use crate::client::ConnectionEnd;
use crate::content::Fnv;
use crate::random::Random;

/// What a peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub length: u64,
    /// FNV-1a.
    pub hash: u64,
    pub end: ConnectionEnd,
}

/// `first` is what goes out in one write with the first bytes.
pub(super) async fn respond(
    connection: &mut Connection,
    plan: &Plan,
    upgraded: Upgraded,
    first: Vec<u8>,
) -> Result<After, Stop> {
    let shared = std::sync::Arc::clone(&connection.shared);
    let early = std::mem::take(&mut connection.buffer);
    let (mut from, mut to) = connection.stream.split();
    let done = match upgraded {
        Upgraded::Echo => {
            to.write_all(&first).await.map_err(|_| Stop::PeerGone)?;
            let received = receive(&mut from, early, Some(&mut to)).await;
            shared.received.lock().push(received);
            Ok(received)
        }
        Upgraded::SendLast => {
            to.write_all(&first).await.map_err(|_| Stop::PeerGone)?;
            let received = receive(&mut from, early, None).await;
            shared.received.lock().push(received);
            send(&mut to, plan, Vec::new()).await.map(|()| received)
        }
        Upgraded::Send => {
            let receive = async {
                let received = receive(&mut from, early, None).await;
                shared.received.lock().push(received);
                // What is to be sent has nobody to go to.
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

/// Takes all that comes, and gives it back if it is to be echoed.
async fn receive(from: &mut ReadHalf<'_>, early: BytesMut, mut echo: Option<&mut WriteHalf<'_>>) -> Received {
    let (mut buffer, mut hash, mut length) = (early, Fnv::default(), 0);
    let end = loop {
        hash.update(&buffer);
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
    if let (ConnectionEnd::Fin, Some(echo)) = (end, echo) {
        let _ = echo.shutdown().await;
    }
    Received { length, hash: hash.value(), end }
}

/// Sends the plan's bytes and the end, as the plan cuts them, holds them up and breaks them off.
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
                FaultKind::Stall => pending::<()>().await,
                FaultKind::StallMs(ms) => sleep(Duration::from_millis(ms)).await,
                FaultKind::Reset => return Err(Stop::Reset),
                FaultKind::Close => return Err(Stop::Close),
            }
        }
        let until = fault.map_or(plan.size, |fault| fault.after.min(plan.size));
        let length = lengths.next().min(until - at);
        let begin = buffer.len();
        buffer.resize(begin + usize::try_from(length).expect("a write fits into memory"), 0);
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
