//! One request over HTTP/1.1, up to the head of its response.

use std::{io::Write as _, net::SocketAddr, rc::Rc, time::Duration};

use bytes::{BufMut as _, BytesMut};
use http::HeaderValue;
use tokio::net::TcpStream;

use super::{Failed, Job, content::Content, fails};
use crate::{
    endpoint::{
        body::ResponseBody,
        connection::{EndpointConnection, Reader},
        sending::{Progress, Sending, Unsent, taken},
    },
    error::Error,
    http::{
        head::HeadLimits,
        response::{RequestFraming, ResponseError, ResponseHead, ResponseParser, write_request},
    },
    metrics::Connection,
};

/// Room for a response head and what comes with it.
const READ: usize = 16 * 1024;
/// A request up to this size leaves in one write.
const ONE_WRITE: usize = 64 * 1024;
/// Interim heads before one response, and their bytes as a multiple of those that a head may have.
const INTERIM_HEADS: usize = 1024;
const INTERIM_BYTES: usize = 16;

/// On a kept connection, and on a fresh one if there is none, if the kept one ended before the endpoint acknowledged a byte, or
/// if a `fresh` one is asked for.
pub(super) async fn turn(
    job: &Job<'_>,
    address: SocketAddr,
    fresh: bool,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    let metrics = &job.worker.shared.metrics;
    let kept = if fresh { None } else { job.worker.endpoints.reuse(address) };
    if let Some(endpoint) = kept {
        metrics.endpoint_connection(Connection::Reused);
        match attempt(job, endpoint, true).await {
            Err(Failed::Early { executed: false, .. }) => metrics.endpoint_retried("kept_connection_closed"),
            Err(Failed::Early { executed, .. }) => return Err(Failed::Early { executed, kept: true }),
            outcome => return outcome,
        }
    }
    let endpoint = job.worker.endpoints.connect(address).await.map_err(|error| {
        metrics.endpoint_connection(Connection::Failed);
        Failed::Connect(error)
    })?;
    metrics.endpoint_connection(Connection::New);
    attempt(job, endpoint, false).await
}

/// One request on one connection, up to the head of its response. An endpoint may answer before it has taken the whole request, so
/// both directions go at once; the rest of the request goes with the response.
async fn attempt(
    job: &Job<'_>,
    mut endpoint: EndpointConnection,
    kept: bool,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    let address = endpoint.address;
    endpoint.announce(job.request.target);
    let before = endpoint.acknowledged();
    let lost = |endpoint: &EndpointConnection| {
        // Where the kernel does not say, the request may have arrived.
        let executed = before.zip(endpoint.acknowledged()).is_none_or(|(before, now)| now > before);
        Failed::Early { executed, kept: false }
    };
    let progress = Progress::begin();
    let Ok(stream) = endpoint.stream() else { return Err(lost(&endpoint)) };
    let prompt = kept && !job.may_be_repeated();
    let work = send(stream, head_of(job, address), job.content.clone(), prompt, progress.clone(), job.idle());
    let sending = Sending::new(work);
    endpoint.set_sending(sending.clone());
    let head = tokio::select! {
        biased;
        head = read_head(job, &mut endpoint, address) => head,
        error = fails(&sending, address) => return Err(error.into()),
        () = progress.overdue(job.request.times.first_byte) => return Err(Error::FirstByte(address).into()),
    };
    let (head, pending) = match head {
        Ok(read) => read,
        Err(Unread::Nothing) => return Err(lost(&endpoint)),
        Err(Unread::Error(error)) => return Err(error.into()),
    };
    // What the connection becomes begins behind the request.
    if head.upgrade.is_some() && (sending.run().await.is_err() || !sending.is_sent()) {
        return Err(Error::EndpointClosed(address).into());
    }
    let body = ResponseBody::Http1 { framing: head.framing, connection: endpoint, pending };
    Ok((head, body))
}

fn framing(content: &Content) -> RequestFraming<'_> {
    match content.length() {
        None => RequestFraming::None,
        Some(_) if !content.trailers().is_empty() => RequestFraming::Chunked(content.trailers()),
        Some(length) => RequestFraming::Length(length),
    }
}

fn head_of(job: &Job<'_>, address: SocketAddr) -> BytesMut {
    let mut out = BytesMut::with_capacity(1024);
    write_request(&job.request.parts, address, framing(&job.content), job.request.upgrade.as_ref(), &mut out);
    out
}

/// Sends the head, which is in `out`, and the content.
///
/// `prompt`: in two segments at least, so that the endpoint's kernel acknowledges them when they are read. On a connection that has
/// carried a response it would wait for the next one (up to 40 ms on Linux), and a reset meanwhile would tell of no acknowledgement
/// (`tcp_measure_rcv_mss`, `__tcp_cleanup_rbuf`).
async fn send(
    endpoint: Rc<TcpStream>,
    mut out: BytesMut,
    content: Content,
    prompt: bool,
    progress: Progress,
    idle: Option<Duration>,
) -> Result<(), Unsent> {
    let chunked = matches!(framing(&content), RequestFraming::Chunked(_));
    if prompt {
        let last = if content.length().is_some_and(|length| length > 0) { 0 } else { 1 };
        let first = out.split_to(out.len() - last);
        write(&endpoint, &first, &progress, idle).await?;
    }
    let mut pieces = content.pieces();
    while let Some(piece) = pieces.next().await.map_err(Unsent::Body)? {
        if out.len() + piece.len() > ONE_WRITE {
            write(&endpoint, &out, &progress, idle).await?;
            out.clear();
        }
        if chunked && !piece.is_empty() {
            // Writing into a BytesMut fails only when memory cannot be had, and then it aborts.
            let _ = write!((&mut out).writer(), "{:x}\r\n", piece.len());
            out.extend_from_slice(&piece);
            out.put_slice(b"\r\n");
        } else {
            out.extend_from_slice(&piece);
        }
    }
    if chunked {
        out.put_slice(b"0\r\n");
        for (name, value) in content.trailers() {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        out.put_slice(b"\r\n");
    }
    write(&endpoint, &out, &progress, idle).await
}

/// Writes all of it. The endpoint has `idle` for each part that it takes.
async fn write(
    endpoint: &TcpStream,
    mut out: &[u8],
    progress: &Progress,
    idle: Option<Duration>,
) -> Result<(), Unsent> {
    while !out.is_empty() {
        match endpoint.try_write(out) {
            Ok(n) => {
                out = &out[n..];
                progress.made();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => taken(idle, endpoint.writable()).await?,
            Err(_) => return Err(Unsent::Refused),
        }
    }
    Ok(())
}

/// Why no head was read.
enum Unread {
    /// The connection ended before a byte.
    Nothing,
    Error(Error),
}

impl From<Error> for Unread {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Reads the head of the final response. Interim ones go to the client where it can take them; their number and size are bounded.
async fn read_head(
    job: &Job<'_>,
    endpoint: &mut EndpointConnection,
    address: SocketAddr,
) -> Result<(ResponseHead, BytesMut), Unread> {
    let limits = job.head_limits();
    let method = &job.request.parts.method;
    let bad = |error| Unread::Error(Error::Response { address, error });
    let Ok((mut reader, _)) = endpoint.split() else { return Err(Unread::Nothing) };
    let mut buf = BytesMut::with_capacity(READ);
    let (mut answered, mut reusable) = (false, true);
    let (mut heads, mut bytes) = (0, 0);
    let mut parser = ResponseParser::default();
    loop {
        match read(&mut reader, &mut buf).await {
            Some(()) => answered = true,
            None if answered => return Err(Error::EndpointClosed(address).into()),
            None => return Err(Unread::Nothing),
        }
        while let Some((mut head, length)) = parser.parse(&buf, &limits, method).map_err(bad)? {
            let _ = buf.split_to(length);
            parser = ResponseParser::default();
            if !is_wanted(head.upgrade.as_ref(), job.request.upgrade.as_ref()) {
                return Err(bad(ResponseError::SwitchingProtocols));
            }
            if !head.interim {
                head.keep_alive &= reusable;
                return Ok((head, buf));
            }
            (heads, bytes, reusable) = (heads + 1, bytes + length, reusable && head.keep_alive);
            bounded(heads, bytes, &limits).map_err(bad)?;
            job.pass_on(head).await;
            // An endpoint that does not stop must not keep the timers, and the worker, from their turn.
            tokio::task::yield_now().await;
        }
        if buf.capacity() - buf.len() < READ / 4 {
            buf.reserve(READ);
        }
    }
}

/// `None`: the connection has ended.
async fn read(reader: &mut Reader<'_>, buf: &mut BytesMut) -> Option<()> {
    matches!(reader.read(buf).await, Ok(1..)).then_some(())
}

fn bounded(heads: usize, bytes: usize, limits: &HeadLimits) -> Result<(), ResponseError> {
    let most = INTERIM_BYTES * limits.bytes;
    match (heads, bytes) {
        (INTERIM_HEADS.., _) if heads > INTERIM_HEADS => {
            Err(ResponseError::Interim { limit: INTERIM_HEADS, what: "heads" })
        }
        _ if bytes > most => Err(ResponseError::Interim { limit: most, what: "bytes" }),
        _ => Ok(()),
    }
}

/// Whether an endpoint that goes on with `protocol` may: the client has asked for it (RFC 9110 §7.8).
fn is_wanted(protocol: Option<&HeaderValue>, asked: Option<&HeaderValue>) -> bool {
    protocol
        .is_none_or(|protocol| asked.is_some_and(|asked| asked.as_bytes().eq_ignore_ascii_case(protocol.as_bytes())))
}
