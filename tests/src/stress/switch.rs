//! A connection that switches protocols: both directions concurrently, each compared by its receiver.

use std::cell::Cell;
use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::{sleep, timeout};

use super::case::{Taking, Upload};
use super::exchange::{Done, Outcome, Short, refused};
use crate::client::ConnectionEnd;
use crate::content::Checker;
use crate::eventually::within;
use crate::model_server::{Fault, FaultKind, ModelServer, Plan, Sequence, Upgraded};
use crate::{Client, Random, Reader};

/// Longest wait for a byte, or for room to send one.
const PATIENCE: Duration = Duration::from_secs(25);

pub(super) async fn run(
    mut client: Client,
    plan: &Plan,
    upload: &Upload,
    taking: Taking,
    servers: &[ModelServer],
) -> Result<Done> {
    let fault = plan.fault.filter(|fault| !matches!(fault.kind, FaultKind::StallMs(_)));
    client.send(&plan.request().header("connection", "upgrade").header("upgrade", "websocket")).await?;
    let head = match client.head().await {
        Ok(head) => head,
        // A reset may discard the head.
        Err(error) if fault.is_some() && error.to_string().contains("Reset") => {
            return Ok(Done::new(Outcome::Broken, 0));
        }
        Err(error) => return Err(error),
    };
    if head.status == 502 && fault.is_some() {
        return Ok(Done::new(Outcome::Broken, 0));
    }
    if head.status != 101 {
        return Err(refused(&mut client, head.status).await);
    }
    let served = head.header("x-served-by").context("the response names no server")?;
    let server = servers.iter().find(|server| server.addr.to_string() == served);
    let server = server.context("the response names an unknown server")?;

    let (mut stream, early) = client.into_parts();
    let echo = plan.upgraded == Some(Upgraded::Echo);
    let (stream_id, size) = if echo { (upload.stream_id, upload.size) } else { (plan.stream_id, plan.size) };
    let mut checker = Checker::of(plan.alphabet, stream_id);
    let (mut from, mut to) = stream.split();
    let reset = Cell::new(false);
    let both = async {
        let down = receive(&mut from, &early, taking, &mut checker, &reset);
        let up = send(&mut to, upload, &reset);
        tokio::pin!(down, up);
        // A client may leave with bytes still to send.
        tokio::select! {
            biased;
            end = &mut down => match end? {
                None => anyhow::Ok(None),
                Some(end) => Ok(Some((end, up.await?))),
            },
            sent = &mut up => {
                let sent = sent?;
                Ok(down.await?.map(|end| (end, sent)))
            }
        }
    };
    let ends = both.await.with_context(|| format!("after the switch, with {served}"))?;
    let bytes = checker.offset();
    let Some((end, sent)) = ends else {
        leave(stream, taking)?;
        right(server, upload.stream_id)?;
        return Ok(Done::new(Outcome::Left, bytes));
    };
    let short = Short { bytes, of: fault.map_or(size, |fault| fault.after) };
    if let Some(fault) = fault {
        ensure!(is_due(fault, end, bytes), short);
        right(server, upload.stream_id)?;
        return Ok(Done::new(Outcome::Broken, bytes));
    }
    ensure!(end == ConnectionEnd::Fin, "{end:?} after {bytes} bytes of {size}");
    ensure!(bytes == size, short);
    ensure!(sent, "the upload was cut off");
    arrived(server, upload).await?;
    Ok(Done::new(Outcome::Complete, bytes))
}

/// Whether a connection with this fault may end like this after so many bytes.
fn is_due(fault: Fault, end: ConnectionEnd, bytes: u64) -> bool {
    match (fault.kind, end) {
        // With unread bytes of ours, a close becomes a reset.
        (FaultKind::Close, ConnectionEnd::Reset) => true,
        (FaultKind::Close, ConnectionEnd::Fin) => bytes == fault.after,
        _ => end == ConnectionEnd::Reset,
    }
}

/// Asserts that the endpoint received the whole upload and its end.
async fn arrived(server: &ModelServer, upload: &Upload) -> Result<()> {
    let ended = || server.upload(upload.stream_id).is_some_and(|upload| upload.end.is_some());
    ensure!(within(PATIENCE, ended).await, "the endpoint did not see the end of the upload");
    let (arrived, end) = right(server, upload.stream_id)?;
    ensure!(end == Some(ConnectionEnd::Fin), "the upload ended with {end:?} after {arrived} bytes");
    ensure!(arrived == upload.size, Short { bytes: arrived, of: upload.size });
    Ok(())
}

/// Asserts that the endpoint received a prefix of the upload.
fn right(server: &ModelServer, stream_id: u64) -> Result<(u64, Option<ConnectionEnd>)> {
    let upload = server.take_upload(stream_id).unwrap_or_default();
    match upload.wrong {
        Some(wrong) => Err(wrong).context("on the way to the endpoint"),
        None => Ok((upload.right, upload.end)),
    }
}

fn leave(stream: TcpStream, taking: Taking) -> Result<()> {
    if let Taking::Part { reset: true, .. } = taking {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    drop(stream);
    Ok(())
}

/// How the connection ended; `None` if the client stops reading. A socket reports a reset once: if a write got it (`reset`), a read
/// sees an orderly close.
async fn receive(
    from: &mut ReadHalf<'_>,
    early: &[u8],
    taking: Taking,
    checker: &mut Checker,
    reset: &Cell<bool>,
) -> Result<Option<ConnectionEnd>> {
    checker.feed(early)?;
    let mut buffer = BytesMut::new();
    let mut stall = match taking {
        Taking::All(Reader::Stalled { after, pause }) => Some((after, pause)),
        _ => None,
    };
    loop {
        match taking {
            Taking::Part { bytes, .. } if checker.offset() >= bytes => return Ok(None),
            Taking::All(Reader::Slow { tick, .. }) => sleep(tick).await,
            _ => {}
        }
        if let Some((_, pause)) = stall.take_if(|(after, _)| checker.offset() >= *after) {
            sleep(pause).await;
        }
        let most = match taking {
            Taking::All(Reader::Slow { bytes, .. }) => bytes.max(1),
            _ => 64 << 10,
        };
        buffer.clear();
        buffer.reserve(most.min(64 << 10));
        let read = timeout(PATIENCE, from.take(most as u64).read_buf(&mut buffer)).await;
        match read.with_context(|| format!("timed out after {} bytes", checker.offset()))? {
            Ok(0) if reset.get() => return Ok(Some(ConnectionEnd::Reset)),
            Ok(0) => return Ok(Some(ConnectionEnd::Fin)),
            Ok(_) => checker.feed(&buffer)?,
            Err(error) if is_reset(&error) => return Ok(Some(ConnectionEnd::Reset)),
            Err(error) => bail!(error),
        }
    }
}

/// Whether everything, including the close, could be sent.
async fn send(to: &mut WriteHalf<'_>, upload: &Upload, reset: &Cell<bool>) -> Result<bool> {
    let mut lengths = Sequence::new(upload.writes);
    let mut random = Random::new(upload.stream_id);
    let (mut at, mut writes, mut buffer) = (0, 0_u64, Vec::new());
    let sending = async {
        while at < upload.size {
            let length = lengths.next().min(upload.size - at);
            buffer.resize(length as usize, 0);
            crate::content::fill(upload.stream_id, at, &mut buffer);
            timeout(PATIENCE, to.write_all(&buffer)).await??;
            at += length;
            writes += 1;
            if let Some(pauses) = upload.pauses.filter(|pauses| writes.is_multiple_of(pauses.every.max(1))) {
                sleep(Duration::from_micros(random.below(pauses.up_to_us + 1))).await;
            }
        }
        to.shutdown().await
    };
    match sending.await {
        Ok(()) => Ok(true),
        Err(error) if is_reset(&error) => {
            reset.set(true);
            Ok(false)
        }
        Err(error) => bail!(error),
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected)
}
