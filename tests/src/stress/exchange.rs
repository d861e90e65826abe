//! Runs one case over a client connection and detects wrong bytes and early orderly closes.

use std::fmt;

use anyhow::{Result, anyhow, ensure};

use super::case::{Case, Exchange, RequestBody, Taking};
use super::switch;
use crate::client::Pace;
use crate::content::{Alphabet, Fnv};
use crate::model_server::{Fault, FaultKind, Framing, ModelServer, Plan};
use crate::reader::at_least;
use crate::{BodyEnd, Client};

/// How a correct exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Complete,
    /// As the plan told the endpoint to.
    Broken,
    /// The client left.
    Left,
}

pub(super) struct Done {
    pub(super) outcome: Outcome,
    /// Bytes of the body that were read, framing included.
    pub(super) bytes: u64,
    /// Whether its connection continues.
    pub(super) client: Option<Client>,
}

impl Done {
    pub(super) fn new(outcome: Outcome, bytes: u64) -> Self {
        Self { outcome, bytes, client: None }
    }
}

/// A stream that closed orderly before its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    pub(super) bytes: u64,
    pub(super) of: u64,
}

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, of } = self;
        write!(f, "orderly close after {bytes} bytes of {of}")
    }
}

impl std::error::Error for Short {}

/// A request that arrived changed: only the number and hash of its bytes are known.
#[derive(Clone, Copy, Debug)]
pub(super) struct Garbled {
    size: u64,
    arrived: u64,
}

impl fmt::Display for Garbled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, arrived } = self;
        write!(f, "a request body of {size} bytes arrived changed, with {arrived}")
    }
}

impl std::error::Error for Garbled {}

/// Runs `case` under the unique request id `name`. Errors are [`crate::content::Mismatch`], [`Short`], [`Garbled`], or describe
/// anything else that is wrong.
pub(super) async fn run(client: Client, case: &Case, name: &str, servers: &[ModelServer]) -> Result<Done> {
    match &case.exchange {
        Exchange::Switch { plan, upload, taking } => switch::run(client, plan, upload, *taking, servers).await,
        Exchange::Response { plan, head_only, body, streamed, taking } => {
            let checked = body.as_ref().map(|body| (body, name));
            let request = request(plan, *head_only, *streamed, checked);
            response(client, plan, &request, *head_only, *taking, servers, checked).await
        }
    }
}

pub(super) fn request(
    plan: &Plan,
    head_only: bool,
    streamed: bool,
    body: Option<(&RequestBody, &str)>,
) -> crate::Request {
    let mut request = plan.request();
    if streamed {
        request = request.header("accept", "text/event-stream");
    }
    if let Some((body, name)) = body {
        let bytes = Alphabet::Binary.bytes(body.stream_id, 0, body.size as usize);
        request.method = "POST".to_owned();
        request = request.header("x-request-id", name);
        request = match body.chunks {
            Some(size) => request.chunked(bytes, size),
            None => request.body(bytes),
        };
        if let Some(pieces) = body.pieces {
            request = request.piecewise(pieces, std::time::Duration::from_micros(200));
        }
    }
    if head_only {
        request.method = "HEAD".to_owned();
    }
    request
}

async fn response(
    mut client: Client,
    plan: &Plan,
    request: &crate::Request,
    head_only: bool,
    taking: Taking,
    servers: &[ModelServer],
    body: Option<(&RequestBody, &str)>,
) -> Result<Done> {
    client.send(request).await?;
    let fault = plan.fault.filter(|fault| !matches!(fault.kind, FaultKind::StallMs(_)));
    let head = match client.head().await {
        Ok(head) => head,
        // A body delimited by close is broken off by a reset, which may discard the head.
        Err(error) if fault.is_some() && error.to_string().contains("Reset") => {
            return Ok(Done::new(Outcome::Broken, 0));
        }
        Err(error) => return Err(error),
    };
    if head.status == 502 && fault.is_some() {
        // The reset discarded the head.
        client.read_body(Pace::Fast, |_| Ok(())).await?;
        return Ok(Done { client: Some(client), ..Done::new(Outcome::Broken, 0) });
    }
    if head.status == 502 && body.is_some_and(|(_, name)| !answered(name, servers)) {
        // The endpoint closed a kept connection while the request was in flight. Its kernel acknowledged the request, so the agent
        // cannot know that it was not read, and a POST is executed at most once (RFC 9110 section 9.2.2).
        let text = text(&mut client).await?;
        ensure!(text.contains("\"endpoint_closed\""), "status 502: {text}");
        return Ok(Done { client: Some(client), ..Done::new(Outcome::Broken, 0) });
    }
    if head.status != 200 {
        return Err(refused(&mut client, head.status).await);
    }
    if let Some((body, name)) = body {
        arrived(body, name, servers)?;
    }
    let mut checker = plan.checker();
    let reader = match taking {
        Taking::All(reader) => reader,
        Taking::Part { bytes, reset } => {
            at_least(&mut client, &mut checker, bytes).await?;
            if reset {
                client.reset()?;
            }
            return Ok(Done::new(Outcome::Left, checker.offset()));
        }
    };
    let read = reader.take(&mut client, &mut checker).await?;
    let whole = if head_only { 0 } else { plan.size };
    let short = Short { bytes: read.len, of: whole };
    let until_close = plan.framing == Framing::UntilClose;
    match fault {
        None => {
            ensure!(read.end == BodyEnd::Complete, "{:?} after {} bytes of {whole}", read.end, read.len);
            ensure!(read.len == whole, short);
            ensure!(head_only || read.trailers == plan.trailers, "trailers {:?}", read.trailers);
            let closes = head.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            let client = (!until_close && !closes).then_some(client);
            return Ok(Done { client, ..Done::new(Outcome::Complete, read.wire) });
        }
        // This end is indistinguishable from the correct one.
        Some(Fault { kind: FaultKind::Close, after }) if until_close => {
            ensure!(read.end == BodyEnd::Complete, "{:?} after {} bytes", read.end, read.len);
            ensure!(read.len == after, Short { of: after, ..short });
        }
        Some(_) => {
            ensure!(read.end != BodyEnd::Complete, short);
            ensure!(read.end == BodyEnd::Reset || !until_close, short);
        }
    }
    Ok(Done::new(Outcome::Broken, read.wire))
}

/// Describes an unexpected response.
pub(super) async fn refused(client: &mut Client, status: u16) -> anyhow::Error {
    match text(client).await {
        Ok(text) => anyhow!("status {status}: {text}"),
        Err(error) => error.context(format!("status {status}")),
    }
}

/// The body, or its beginning if incomplete.
async fn text(client: &mut Client) -> Result<String> {
    let mut text = Vec::new();
    let read = client.read_body(Pace::Fast, |bytes| {
        text.extend_from_slice(&bytes[..bytes.len().min(500)]);
        Ok(())
    });
    let end = read.await?.end;
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(end == BodyEnd::Complete, "{end:?} after: {text}");
    Ok(text)
}

/// Whether an endpoint has started to answer the request with this id.
fn answered(name: &str, servers: &[ModelServer]) -> bool {
    servers.iter().any(|server| server.sent(name).is_some())
}

/// Whether the endpoint received every byte of the request.
fn arrived(body: &RequestBody, name: &str, servers: &[ModelServer]) -> Result<()> {
    let bytes = Alphabet::Binary.bytes(body.stream_id, 0, body.size as usize);
    let hash = Fnv::of(&bytes).value();
    // The records of a repeated request are identical.
    for sent in servers.iter().filter_map(|server| server.sent(name)) {
        let same = (sent.request_length, sent.request_hash) == (body.size, hash);
        ensure!(same, Garbled { size: body.size, arrived: sent.request_length });
    }
    Ok(())
}
