//! Planned responses: the bytes after the head come from [`Wire`] and are cut into writes, paused and broken off independently of
//! their meaning.

use std::fmt::Write as _;
use std::time::Duration;

use super::connection::{Connection, Stop};
use super::plan::{After, FaultKind, Framing, Plan};
use super::request::Request;
use super::sequence::Sequence;
use super::upgraded;
use crate::random::Random;

pub(super) async fn respond(connection: &mut Connection, request: &Request, plan: &Plan) -> Result<After, Stop> {
    for status in &plan.interim {
        let reason = http::StatusCode::from_u16(*status).ok().and_then(|code| code.canonical_reason()).unwrap_or("");
        connection.write(format!("HTTP/1.1 {status} {reason}\r\nx-interim: {status}\r\n\r\n").as_bytes()).await?;
    }
    let bodiless = (request.echo.method == "HEAD" || plan.framing == Framing::None) && plan.upgraded.is_none();
    let said = said(plan, request);
    let plan = &Plan { size: said.as_ref().map_or(plan.size, |said| said.len() as u64), ..plan.clone() };
    let mut wire = Wire::new(plan, said.as_deref());
    let mut first = head(connection, plan).into_bytes();
    let pause = Some(Duration::from_micros(plan.head.pause_us));
    if let Some(at) = plan.head.split_at {
        let rest = first.split_off(at.min(first.len()));
        connection.write(&first).await?;
        connection.pause(pause).await?;
        first = rest;
    }
    if !plan.head.with_body || bodiless {
        connection.write(&first).await?;
        first.clear();
        if plan.upgraded.is_some() {
            // A peer that has ended its side has not left.
            tokio::time::sleep(Duration::from_micros(plan.head.pause_us)).await;
        } else if !bodiless {
            connection.pause(pause).await?;
        }
    }
    if plan.cork {
        connection.cork();
    }
    if let Some(upgraded) = plan.upgraded {
        return upgraded::respond(connection, plan, upgraded, first).await;
    }
    if !bodiless {
        body(connection, plan, &mut wire, first).await?;
    }
    let closes = plan.framing == Framing::UntilClose && plan.after == After::KeepAlive;
    Ok(if closes { After::SilentClose } else { plan.after })
}

/// The payload that the request brings along, if the plan says so.
fn said(plan: &Plan, request: &Request) -> Option<Vec<u8>> {
    let body: serde_json::Value = plan.says.then(|| serde_json::from_slice(&request.body).ok())??;
    Some(body["x-test-says"].as_str()?.as_bytes().to_vec())
}

fn head(connection: &Connection, plan: &Plan) -> String {
    let mut head = connection.head(plan.status);
    let given = |name: &str| plan.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
    if plan.framing != Framing::None && !given("content-type") {
        head.push_str("content-type: application/octet-stream\r\n");
    }
    match plan.framing {
        Framing::ContentLength => {
            let _ = write!(head, "content-length: {}\r\n", plan.size.saturating_add_signed(plan.length_error));
        }
        Framing::Chunked => head.push_str("transfer-encoding: chunked\r\n"),
        Framing::UntilClose | Framing::None => {}
    }
    if plan.after == After::Close {
        head.push_str("connection: close\r\n");
    }
    for (name, value) in &plan.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    head
}

/// Writes the bytes after the head; `first` precedes them in the first write.
async fn body(connection: &mut Connection, plan: &Plan, wire: &mut Wire<'_>, first: Vec<u8>) -> Result<(), Stop> {
    let mut lengths = Sequence::new(plan.writes);
    let mut random = plan.pauses.map(|pauses| Random::new(pauses.seed));
    let (mut sent, mut writes) = (0, 0_u64);
    let mut buffer = first;
    loop {
        if let Some(fault) = plan.fault
            && fault.after == sent
        {
            if !buffer.is_empty() {
                connection.write(&buffer).await?;
                buffer.clear();
            }
            match fault.kind {
                FaultKind::Stall => connection.pause(None).await?,
                FaultKind::UntilTold => connection.until_told().await?,
                FaultKind::StallMs(ms) => connection.pause(Some(Duration::from_millis(ms))).await?,
                FaultKind::Reset => return Err(Stop::Reset),
                FaultKind::ResetWhenTold => {
                    connection.until_told().await?;
                    return Err(Stop::Reset);
                }
                FaultKind::Close => return Err(Stop::Close),
            }
        }
        let before_fault = plan.fault.map_or(u64::MAX, |fault| fault.after.wrapping_sub(sent));
        let room = lengths.next().min(if before_fault == 0 { u64::MAX } else { before_fault });
        let n = wire.take(&mut buffer, room);
        if buffer.is_empty() {
            return Ok(());
        }
        connection.write(&buffer).await?;
        buffer.clear();
        sent += n;
        writes += 1;
        if let (Some(pauses), Some(random)) = (plan.pauses, &mut random)
            && writes.is_multiple_of(pauses.every.max(1))
        {
            let pause = random.below(pauses.up_to_us.saturating_add(1));
            connection.pause(Some(Duration::from_micros(pause))).await?;
        }
    }
}

/// The bytes after the head, framing included.
struct Wire<'a> {
    plan: &'a Plan,
    /// The payload, if it is not the plan's alphabet.
    said: Option<&'a [u8]>,
    chunks: Sequence,
    /// Framing to be sent before any more payload.
    pending: Vec<u8>,
    /// Payload produced so far.
    offset: u64,
    /// Payload up to the next piece of framing.
    open: u64,
    ended: bool,
}

impl<'a> Wire<'a> {
    fn new(plan: &'a Plan, said: Option<&'a [u8]>) -> Self {
        let chunked = plan.framing == Framing::Chunked;
        Self {
            plan,
            said,
            chunks: Sequence::new(plan.chunks),
            pending: Vec::new(),
            offset: 0,
            open: if chunked { 0 } else { plan.size },
            ended: !chunked,
        }
    }

    /// Appends up to `n` bytes to `out`; returns how many there were.
    fn take(&mut self, out: &mut Vec<u8>, n: u64) -> u64 {
        let mut taken = 0;
        while taken < n {
            let left = n - taken;
            if !self.pending.is_empty() {
                let n = usize::try_from(left).unwrap_or(usize::MAX).min(self.pending.len());
                out.extend(self.pending.drain(..n));
                taken += n as u64;
            } else if self.open > 0 {
                let n = left.min(self.open);
                let at = out.len();
                out.resize(at + usize::try_from(n).expect("the write exceeds memory"), 0);
                let (begin, out) = (usize::try_from(self.offset).expect("the body exceeds memory"), &mut out[at..]);
                match self.said {
                    Some(said) => out.copy_from_slice(&said[begin..begin + out.len()]),
                    None => self.plan.alphabet.fill(self.plan.stream_id, self.offset, out),
                }
                self.offset += n;
                self.open -= n;
                taken += n;
            } else if self.ended {
                break;
            } else {
                self.next_chunk();
            }
        }
        taken
    }

    fn next_chunk(&mut self) {
        let plan = self.plan;
        let mut line = String::new();
        if self.offset > 0 {
            line.push_str("\r\n");
        }
        self.open = self.chunks.next().min(plan.size - self.offset);
        let _ = write!(line, "{:x}", self.open);
        if let Some(extension) = &plan.chunk_extension {
            let _ = write!(line, ";{extension}");
        }
        line.push_str("\r\n");
        if self.open == 0 {
            self.ended = true;
            for (name, value) in &plan.trailers {
                let _ = write!(line, "{name}: {value}\r\n");
            }
            line.push_str("\r\n");
        }
        self.pending = line.into_bytes();
    }
}
