//! Sends one request over HTTP/2, on a stream of its own, and returns the head of the response.

use std::{collections::VecDeque, future::poll_fn, net::SocketAddr, rc::Rc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::ResponseFuture};
use http::{HeaderMap, HeaderValue, Uri, Version, header};

use super::{AttemptError, Interim, Job, content::Content, send_failure};
use crate::{
    endpoint::{
        body::ResponseBody,
        http2::{Http2Stream, RequestAccount},
        sending::{ClientTime, CutReason, Progress, SendError, Sending, Unfinished},
    },
    error::Error,
    http::{
        fields,
        response::{BodyKind, ResponseError, ResponseHead, from_http2, interim_from_http2},
    },
    metrics::Connection,
};

/// How often a request is sent while the endpoint refuses the stream.
const REFUSALS: u32 = 3;

/// Sends the request on a new stream. If the endpoint refuses the stream, because it is closing the connection or is overloaded,
/// sends it again, on another connection if the first is closing.
pub(super) async fn turn(job: &Job<'_>, address: SocketAddr) -> Result<(ResponseHead, ResponseBody), AttemptError> {
    let metrics = &job.worker.shared.metrics;
    let mut failed = AttemptError::ClosedEarly { executed: false, kept: false };
    for _ in 0..REFUSALS {
        let stream = job.worker.http2_endpoints.stream(address).await.map_err(|error| {
            metrics.endpoint_connection(Connection::Failed);
            AttemptError::Connect(error)
        })?;
        let reused = stream.reused;
        metrics.endpoint_connection(if reused { Connection::Reused } else { Connection::New });
        match attempt(job, address, stream).await {
            Err(StreamError::Refused) => metrics.endpoint_retried("stream_refused"),
            Err(StreamError::Failed(AttemptError::ClosedEarly { executed: false, .. })) if reused => {
                metrics.endpoint_retried("kept_connection_closed");
            }
            Err(StreamError::Failed(error @ AttemptError::ClosedEarly { .. })) => {
                failed = error;
                break;
            }
            Err(StreamError::Failed(failed)) => return Err(failed),
            Ok(answer) => return Ok(answer),
        }
    }
    Err(failed)
}

enum StreamError {
    /// The endpoint did not process the request (RFC 9113 §8.7).
    Refused,
    Failed(AttemptError),
}

impl From<Error> for StreamError {
    fn from(error: Error) -> Self {
        Self::Failed(error.into())
    }
}

/// The rest of the request is sent while the response is delivered, as over HTTP/1.1.
async fn attempt(
    job: &Job<'_>,
    address: SocketAddr,
    mut stream: Http2Stream,
) -> Result<(ResponseHead, ResponseBody), StreamError> {
    let before = stream.acknowledged();
    let has_body = job.content.length().is_some_and(|length| length > 0) || job.content.trailers().is_some();
    // Opening fails only if the connection has ended since it was chosen; nothing was sent.
    let opened = stream.open(head(job, address), !has_body);
    let (response, out, account) = opened.map_err(|_| StreamError::Refused)?;
    let account = Rc::new(account);
    let request = Rc::clone(&account);
    let progress = Progress::begin(before, move || request.acknowledged());
    let unfinished = Unfinished::default();
    let (sending, cut) = if has_body {
        let cut = CutReason::default();
        let out = BodySender { stream: out, account, ended: false, cut: cut.clone() };
        let sending = Sending::new(send(out, job.content.clone(), progress.clone(), job.idle(), unfinished.clone()));
        (sending, Some(cut))
    } else {
        (Sending::new(async { Ok(()) }), None)
    };
    let client = ClientTime::default();
    let head = tokio::select! {
        biased;
        head = read_head(job, address, response, &client) => head,
        error = send_failure(&sending, address) => return Err(error.into()),
        () = progress.overdue(job.request.timeouts.first_byte, &client) => return Err(Error::FirstByte(address).into()),
    };
    let (head, body) = match head {
        Ok(read) => read,
        Err(Http2ReadError::Http2(error)) if is_refused(&error) => return Err(StreamError::Refused),
        // What another stream of a kept connection did ends that connection, too.
        Err(Http2ReadError::Http2(error)) if error.is_library() && (error.is_reset() || !stream.reused) => {
            let error = ResponseError::Http2 { error: error.to_string() };
            return Err(Error::Response { address, error }.into());
        }
        Err(Http2ReadError::Http2(error)) => {
            // Acknowledged bytes may belong to any stream of the connection, so assume this one's.
            let executed = stream.acknowledged_more(before).await.unwrap_or(true);
            // The reset of one stream says nothing about the age of the connection.
            let kept = stream.reused && !error.is_reset();
            return Err(StreamError::Failed(AttemptError::ClosedEarly { executed, kept }));
        }
        Err(Http2ReadError::Error(error)) => return Err(error.into()),
    };
    if let (true, Some(cut)) = (body.is_end_stream(), &cut) {
        cut.set_answered();
    }
    let body = Some(body).filter(|_| head.body != BodyKind::None);
    Ok((head, ResponseBody::Http2 { body, stream, sending, cut, _unfinished: unfinished }))
}

/// Why no head was read.
enum Http2ReadError {
    /// The stream ended before the head.
    Http2(h2::Error),
    Error(Error),
}

/// Reads the head of the final response. Interim heads are queued for the client, as over HTTP/1.1.
async fn read_head(
    job: &Job<'_>,
    address: SocketAddr,
    mut response: ResponseFuture,
    client: &ClientTime,
) -> Result<(ResponseHead, RecvStream), Http2ReadError> {
    let (method, limits) = (&job.request.parts.method, job.head_limits());
    let bad = |error| Http2ReadError::Error(Error::Response { address, error });
    let mut interim = Interim::default();
    // h2 queues interim heads without a limit. They are taken as they arrive and counted, however slowly the client takes them.
    let mut queue = VecDeque::new();
    loop {
        let forwarded = async {
            match queue.front() {
                Some(head) => job.queue_interim(ResponseHead::clone(head)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            next = poll_fn(|cx| response.poll_informational(cx)) => {
                // Awaiting the response returns an error, too.
                let Some(Ok(head)) = next else { break };
                let (parts, ()) = head.into_parts();
                let bytes = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
                interim.add(bytes, &limits).map_err(bad)?;
                queue.push_back(interim_from_http2(parts, &limits).map_err(bad)?);
            }
            () = forwarded => drop(queue.pop_front()),
        }
    }
    // The endpoint has sent the final head, or failed.
    for head in queue {
        client.during(job.queue_interim(head)).await;
    }
    let (parts, body) = response.await.map_err(Http2ReadError::Http2)?.into_parts();
    Ok((from_http2(parts, body.is_end_stream(), method, &limits).map_err(bad)?, body))
}

/// Whether the endpoint did not process the request (RFC 9113 §8.7).
fn is_refused(error: &h2::Error) -> bool {
    // A remote GOAWAY is an error only for streams that it reports as not processed.
    error.is_remote() && (error.reason() == Some(h2::Reason::REFUSED_STREAM) || error.is_go_away())
}

fn head(job: &Job<'_>, address: SocketAddr) -> http::Request<()> {
    let parts = &job.request.parts;
    let own = [header::HOST, header::CONTENT_LENGTH, header::EXPECT, header::TRAILER];
    let fields = parts.headers.iter().filter(|(name, _)| !fields::is_hop_by_hop(name) && !own.contains(name));
    let mut head = http::Request::new(());
    *head.method_mut() = parts.method.clone();
    *head.version_mut() = Version::HTTP_2;
    head.headers_mut().extend(fields.map(|(name, value)| (name.clone(), value.clone())));
    // Go's servers drop trailers that are not announced.
    for name in job.content.trailers().into_iter().flat_map(HeaderMap::keys) {
        head.headers_mut().append(header::TRAILER, HeaderValue::from_name(name.clone()));
    }
    // HTTP/2 always allows trailers, and gRPC requires the field.
    head.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(length) = job.content.length() {
        head.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let uri = |authority: &str| Uri::builder().scheme("http").authority(authority).path_and_query(path).build();
    // A request of an HTTP/1.0 client may have no Host; use the endpoint's address then.
    if let Ok(uri) = uri(host).or_else(|_| uri(&address.to_string())) {
        *head.uri_mut() = uri;
    }
    head
}

/// Sends a request body. Dropping it before the end resets the stream, even if the endpoint's window is full.
struct BodySender {
    stream: SendStream<Bytes>,
    account: Rc<RequestAccount>,
    ended: bool,
    cut: CutReason,
}

impl BodySender {
    /// Waits until the endpoint's window has room. Returns the number of bytes, at most `wanted`.
    async fn room(&mut self, wanted: usize) -> Result<usize, h2::Error> {
        // Reserve only when there is something to send: other streams cannot use what this one reserves of the connection's window.
        self.stream.reserve_capacity(wanted);
        while self.stream.capacity() == 0 {
            // Also ready if another stream has taken the capacity meanwhile.
            poll_fn(|cx| self.stream.poll_capacity(cx)).await.ok_or(h2::Reason::STREAM_CLOSED)??;
        }
        Ok(self.stream.capacity())
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), h2::Error> {
        self.ended = true;
        match trailers {
            None => self.stream.send_data(Bytes::new(), true),
            Some(trailers) => self.stream.send_trailers(trailers),
        }
    }
}

impl Drop for BodySender {
    fn drop(&mut self) {
        if !self.ended {
            self.stream.send_reset(self.cut.get());
        }
    }
}

/// Sends the request's body. After a failure the stream stays open in `unfinished`, because the response may continue.
async fn send(
    mut out: BodySender,
    content: Content,
    progress: Progress,
    idle: Option<Duration>,
    unfinished: Unfinished,
) -> Result<(), SendError> {
    let sent = send_body(&mut out, content, progress, idle).await;
    if sent.is_err() {
        // What it waits for of the connection's window is for the others.
        out.stream.reserve_capacity(0);
        unfinished.keep(out);
    }
    sent
}

/// The last byte of a body without trailers carries the end of the stream, so that a small request is sent at once.
async fn send_body(
    out: &mut BodySender,
    content: Content,
    progress: Progress,
    idle: Option<Duration>,
) -> Result<(), SendError> {
    let mut left = content.length().filter(|_| content.trailers().is_none());
    let mut pieces = content.pieces();
    while let Some(mut piece) = pieces.next().await.map_err(SendError::Body)? {
        while !piece.is_empty() {
            let room = progress.wait(idle, out.room(piece.len())).await?;
            let part = piece.split_to(room.min(piece.len()));
            left = left.map(|left| left.saturating_sub(part.len() as u64));
            let ends = left == Some(0);
            out.account.give(part.len());
            out.stream.send_data(part, ends).map_err(|_| SendError::Refused)?;
            out.ended = ends;
            progress.made();
        }
    }
    if !out.ended {
        out.end(content.trailers().cloned()).map_err(|_| SendError::Refused)?;
        progress.made();
    }
    Ok(())
}
