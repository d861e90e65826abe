//! Sends one request over HTTP/2, on a stream of its own, and returns the head of the response.

use std::{error::Error as _, net::SocketAddr, time::Duration};

use http::{HeaderValue, Uri, Version, header};
use hyper::body::Body as _;

use super::{AttemptError, Job, content::Content, send_failure};
use crate::{
    endpoint::{
        body::ResponseBody,
        http2::Stream,
        sending::{Progress, SendError, Sending, with_idle_timeout},
    },
    error::Error,
    http::{
        frames::{FrameBody, FrameSender},
        headers,
        response::{BodyKind, ResponseHead, from_http2},
    },
    metrics::Connection,
};

/// How often a request is sent while the endpoint refuses the stream.
const REFUSALS: u32 = 3;
/// Largest piece of a body that is passed to the connection at once. Progress is measured in steps of this size.
const PIECE: usize = 16 * 1024;

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
            Err(StreamError::Failed(AttemptError::ClosedEarly { executed, .. })) => {
                failed = AttemptError::ClosedEarly { executed, kept: reused };
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
    mut stream: Stream,
) -> Result<(ResponseHead, ResponseBody), StreamError> {
    let before = stream.acknowledged();
    let progress = Progress::begin();
    let trailers = !job.content.trailers().is_empty();
    let (sending, cut, frames) = match job.content.length() {
        Some(length) if length > 0 || trailers => {
            let (sender, frames) = FrameBody::request(length);
            let cut = sender.cut();
            let sending = Sending::new(send(sender, job.content.clone(), progress.clone(), job.idle()));
            (sending, Some(cut), frames)
        }
        _ => (Sending::new(async { Ok(()) }), None, FrameBody::whole(bytes::Bytes::new())),
    };
    let sent = stream.send.send_request(head(job, address).map(|()| frames));
    let response = tokio::select! {
        biased;
        response = sent => response,
        error = send_failure(&sending, address) => return Err(error.into()),
        () = progress.overdue(job.request.timeouts.first_byte) => return Err(Error::FirstByte(address).into()),
    };
    let (parts, body) = response
        .map_err(|error| {
            if is_refused(&error) {
                return StreamError::Refused;
            }
            // Acknowledged bytes may belong to any stream of the connection, so assume this one's.
            let executed = before.zip(stream.acknowledged()).is_none_or(|(before, now)| now > before);
            StreamError::Failed(AttemptError::ClosedEarly { executed, kept: false })
        })?
        .into_parts();
    let head = from_http2(parts, body.is_end_stream(), &job.request.parts.method, &job.head_limits())
        .map_err(|error| Error::Response { address, error })?;
    let body = Some(body).filter(|_| head.body != BodyKind::None);
    Ok((head, ResponseBody::Http2 { body, stream, sending, cut }))
}

/// Whether the endpoint did not process the request (RFC 9113 §8.7), or it was never sent.
fn is_refused(error: &hyper::Error) -> bool {
    let http2 = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    // A remote GOAWAY is an error only for streams that it reports as not processed.
    let refused = http2.is_some_and(|error| {
        (error.reason() == Some(h2::Reason::REFUSED_STREAM) && error.is_remote())
            || (error.is_go_away() && error.is_remote())
    });
    // hyper reports unsent requests as cancelled.
    refused || error.is_canceled()
}

fn head(job: &Job<'_>, address: SocketAddr) -> http::Request<()> {
    let parts = &job.request.parts;
    let own = [header::HOST, header::CONTENT_LENGTH, header::EXPECT, header::TRAILER];
    let fields = parts.headers.iter().filter(|(name, _)| !headers::is_hop_by_hop(name) && !own.contains(name));
    let mut head = http::Request::new(());
    *head.method_mut() = parts.method.clone();
    *head.version_mut() = Version::HTTP_2;
    head.headers_mut().extend(fields.map(|(name, value)| (name.clone(), value.clone())));
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

async fn send(
    sender: FrameSender,
    content: Content,
    progress: Progress,
    idle: Option<Duration>,
) -> Result<(), SendError> {
    let mut pieces = content.pieces();
    while let Some(mut piece) = pieces.next().await.map_err(SendError::Body)? {
        while !piece.is_empty() {
            let part = piece.split_to(piece.len().min(PIECE));
            with_idle_timeout(idle, sender.data(part)).await?;
            progress.made();
        }
    }
    with_idle_timeout(idle, sender.end(content.trailers().clone())).await?;
    progress.made();
    Ok(())
}
