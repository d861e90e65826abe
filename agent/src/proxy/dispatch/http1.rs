//! Sends one request over HTTP/1.1 and returns the head of the final response.

use std::{io::Write as _, net::SocketAddr, time::Duration};

use bytes::{BufMut as _, BytesMut};
use http::HeaderValue;

use super::{AttemptError, Interim, Job, content::Content, send_failure};
use crate::{
    endpoint::{
        body::ResponseBody,
        connection::EndpointConnection,
        sending::{ClientTime, Progress, SendError, Sending},
        tls::EndpointWriter,
    },
    error::Error,
    http::{
        head::elements,
        response::{AfterResponse, RequestFraming, ResponseError, ResponseHead, ResponseParser, write_request},
    },
    kernel::wire::{self, Watched, WireError},
    metrics::Connection,
    steer::{reader::Reader, reason::SteerReason},
};

/// Read buffer for a response head and the bytes that arrive with it.
const READ: usize = 16 * 1024;
/// A request of up to this size is sent in one write.
const ONE_WRITE: usize = 64 * 1024;

/// Sends the request on a kept connection. Uses a new one if none is kept, if `fresh` asks for it, or if the kept one ended before
/// the endpoint acknowledged a byte.
pub(super) async fn turn(
    job: &Job<'_>,
    address: SocketAddr,
    fresh: bool,
) -> Result<(ResponseHead, ResponseBody), AttemptError> {
    let metrics = &job.worker.shared.metrics;
    let tls = job.worker.shared.endpoint_tls[job.request.pool].as_deref();
    let kept = if fresh { None } else { job.worker.endpoints.reuse(address, tls) };
    if let Some(endpoint) = kept {
        metrics.endpoint_connection(Connection::Reused);
        match attempt(job, endpoint, true).await {
            Err(AttemptError::ClosedEarly { executed: false, .. }) => {
                metrics.endpoint_retried("kept_connection_closed");
            }
            Err(AttemptError::ClosedEarly { executed, .. }) => {
                return Err(AttemptError::ClosedEarly { executed, kept: true });
            }
            outcome => return outcome,
        }
    }
    let endpoint = job.worker.endpoints.connect(address, tls).await.map_err(|error| {
        metrics.endpoint_connection(Connection::Failed);
        AttemptError::Connect(error)
    })?;
    metrics.endpoint_connection(Connection::New);
    attempt(job, endpoint, false).await
}

/// Sends the request on one connection and reads the head of the response. An endpoint may respond before it has read the whole
/// request, so both directions run at once. The rest of the request is sent while the response is delivered.
async fn attempt(
    job: &Job<'_>,
    mut endpoint: EndpointConnection,
    kept: bool,
) -> Result<(ResponseHead, ResponseBody), AttemptError> {
    let address = endpoint.address;
    endpoint.announce(job.request.target);
    endpoint.set_watched(watch(job, &endpoint));
    let before = endpoint.acknowledged_before();
    let lost = async |endpoint: &EndpointConnection| {
        // If the kernel does not report acknowledged bytes, assume that the request arrived.
        let executed = endpoint.acknowledged_more(before).await.unwrap_or(true);
        AttemptError::ClosedEarly { executed, kept: false }
    };
    let Ok(writer) = endpoint.writer() else { return Err(lost(&endpoint).await) };
    let socket = writer.clone();
    let progress = Progress::begin(before, move || socket.acknowledged());
    let prompt = kept && !job.may_be_repeated();
    let work = send(
        writer,
        head_of(job, address, endpoint.is_watched()),
        job.content.clone(),
        prompt,
        progress.clone(),
        job.idle(),
    );
    let sending = Sending::new(work);
    endpoint.set_sending(sending.clone());
    let client = ClientTime::default();
    let head = tokio::select! {
        biased;
        head = read_head(job, &mut endpoint, address, &client) => head,
        error = send_failure(&sending, address) => return Err(error.into()),
        () = progress.overdue(job.request.timeouts.first_byte, &client) => return Err(Error::FirstByte(address).into()),
    };
    let (head, pending) = match head {
        Ok(read) => read,
        Err(Http1ReadError::Nothing) => return Err(lost(&endpoint).await),
        Err(Http1ReadError::Error(error)) => return Err(error.into()),
    };
    // The upgraded protocol begins after the request, so the request has to be sent to its end.
    if head.upgrade.is_some() && (sending.run().await.is_err() || !sending.is_sent()) {
        return Err(Error::EndpointClosed(address).into());
    }
    let body = ResponseBody::Http1 { framing: head.framing, connection: endpoint, pending };
    Ok((head, body))
}

fn framing(content: &Content) -> RequestFraming<'_> {
    match content.length() {
        None => RequestFraming::None,
        Some(length) => content.trailers().map_or(RequestFraming::Length(length), RequestFraming::Chunked),
    }
}

/// Watches the connections for path `wire`, or says why not; `None` if the path is not in use.
fn watch(job: &Job<'_>, endpoint: &EndpointConnection) -> Option<Result<Watched, SteerReason>> {
    let wire = job.worker.wire.as_ref()?;
    let watch = |client| {
        let watched = endpoint
            .stream()
            .map_err(WireError::from)
            .and_then(|endpoint| wire.watch(client, wire::TcpConnection::of(&*endpoint)?));
        watched.map_err(|error| {
            tracing::debug!(address = %endpoint.address, %error, "connections cannot be watched, relaying the response");
            SteerReason::Unfit
        })
    };
    Some(job.request.wire?.and_then(watch))
}

/// `closes`: the endpoint shall close the connection after its response.
fn head_of(job: &Job<'_>, address: SocketAddr, closes: bool) -> BytesMut {
    let mut out = BytesMut::with_capacity(1024);
    let after = match &job.request.upgrade {
        Some(protocol) => AfterResponse::Upgrade(protocol),
        None if closes => AfterResponse::Close,
        None => AfterResponse::Keep,
    };
    write_request(&job.request.parts, address, framing(&job.content), after, &mut out);
    out
}

/// Sends the head, which is in `out`, and the content.
///
/// `prompt` splits the request into at least two segments, so that the endpoint's kernel acknowledges them as soon as they are
/// read. On a connection that has carried a response, Linux delays the acknowledgement of a single segment by up to 40 ms, and a
/// reset in that time would look as if nothing had been received (`tcp_measure_rcv_mss`, `__tcp_cleanup_rbuf`).
async fn send(
    endpoint: EndpointWriter,
    mut out: BytesMut,
    content: Content,
    prompt: bool,
    progress: Progress,
    idle: Option<Duration>,
) -> Result<(), SendError> {
    let chunked = matches!(framing(&content), RequestFraming::Chunked(_));
    if prompt {
        let last = if content.length().is_some_and(|length| length > 0) { 0 } else { 1 };
        let first = out.split_to(out.len() - last);
        write(&endpoint, &first, &progress, idle).await?;
    }
    let mut pieces = content.pieces();
    while let Some(piece) = pieces.next().await.map_err(SendError::Body)? {
        if out.len() + piece.len() > ONE_WRITE {
            write(&endpoint, &out, &progress, idle).await?;
            out.clear();
        }
        if chunked && !piece.is_empty() {
            // Writing to a BytesMut cannot fail; if memory runs out, it aborts.
            let _ = write!((&mut out).writer(), "{:x}\r\n", piece.len());
            out.extend_from_slice(&piece);
            out.put_slice(b"\r\n");
        } else {
            out.extend_from_slice(&piece);
        }
    }
    if chunked {
        out.put_slice(b"0\r\n");
        for (name, value) in content.trailers().into_iter().flatten() {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        }
        out.put_slice(b"\r\n");
    }
    write(&endpoint, &out, &progress, idle).await
}

/// Writes all of `out`. `idle` limits the wait without progress.
async fn write(
    endpoint: &EndpointWriter,
    mut out: &[u8],
    progress: &Progress,
    idle: Option<Duration>,
) -> Result<(), SendError> {
    while !out.is_empty() {
        match endpoint.try_write(out) {
            Ok(n) => {
                out = &out[n..];
                progress.made();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                progress.wait(idle, endpoint.writable()).await?;
            }
            Err(_) => return Err(SendError::Refused),
        }
    }
    loop {
        match endpoint.try_flush() {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                progress.wait(idle, endpoint.writable()).await?;
                progress.made();
            }
            Err(_) => return Err(SendError::Refused),
        }
    }
}

/// Why no head was read.
enum Http1ReadError {
    /// The connection ended before the first byte.
    Nothing,
    Error(Error),
}

impl From<Error> for Http1ReadError {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Reads the head of the final response. Interim heads are queued for the client; their number and size are bounded.
async fn read_head(
    job: &Job<'_>,
    endpoint: &mut EndpointConnection,
    address: SocketAddr,
    client: &ClientTime,
) -> Result<(ResponseHead, BytesMut), Http1ReadError> {
    let limits = job.head_limits();
    let method = &job.request.parts.method;
    let bad = |error| Http1ReadError::Error(Error::Response { address, error });
    let Ok((mut reader, _)) = endpoint.split() else { return Err(Http1ReadError::Nothing) };
    let mut buf = BytesMut::with_capacity(READ);
    let (mut answered, mut reusable, mut interim) = (false, true, Interim::default());
    let mut parser = ResponseParser::default();
    loop {
        match read(&mut reader, &mut buf).await {
            Some(()) => answered = true,
            None if answered => return Err(Error::EndpointClosed(address).into()),
            None => return Err(Http1ReadError::Nothing),
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
            reusable &= head.keep_alive;
            interim.add(length, &limits).map_err(bad)?;
            client.during(job.queue_interim(head)).await;
            // An endpoint that sends heads without end must not starve the timers and the worker's other tasks.
            tokio::task::yield_now().await;
        }
        if buf.capacity() - buf.len() < READ / 4 {
            buf.reserve(READ);
        }
    }
}

/// Returns `None` if the connection has ended.
async fn read(reader: &mut Reader<'_>, buf: &mut BytesMut) -> Option<()> {
    matches!(reader.read(buf).await, Ok(1..)).then_some(())
}

/// Whether the endpoint may switch to `protocols`: only to such as the client asked for (RFC 9110 §7.8).
fn is_wanted(protocols: Option<&HeaderValue>, asked: Option<&HeaderValue>) -> bool {
    let is_asked = |protocol: &[u8]| {
        asked.is_some_and(|asked| elements(asked.as_bytes()).any(|asked| asked.eq_ignore_ascii_case(protocol)))
    };
    protocols.is_none_or(|protocols| elements(protocols.as_bytes()).all(is_asked))
}
