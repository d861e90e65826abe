//! One request on one stream of an HTTP/2 connection, up to the head of its response.

use std::{error::Error as _, net::SocketAddr, time::Duration};

use http::{HeaderValue, Uri, Version, header};
use hyper::body::Body as _;

use super::{Failed, Job, content::Content, fails};
use crate::{
    endpoint::{
        body::ResponseBody,
        http2::Stream,
        sending::{Progress, Sending, Unsent, taken},
    },
    error::Error,
    http::{
        frames::{FrameBody, FrameSender},
        headers,
        response::{BodyKind, ResponseHead, from_http2},
    },
    metrics::Connection,
};

/// How often a request that the endpoint has not looked at is sent again at once.
const REFUSALS: u32 = 3;
/// Largest piece of a body that is handed over at once: what an endpoint takes is seen in steps of this size.
const PIECE: usize = 16 * 1024;

/// On a stream of its own. One that the endpoint refuses unseen, because it is about to close the connection or has too
/// much to do, is tried again, on another connection if the first is closing.
pub(super) async fn turn(job: &Job<'_>, address: SocketAddr) -> Result<(ResponseHead, ResponseBody), Failed> {
    let metrics = &job.worker.shared.metrics;
    let mut failed = Failed::Early { executed: false, kept: false };
    for _ in 0..REFUSALS {
        let stream = job.worker.http2_endpoints.stream(address).await.map_err(|error| {
            metrics.endpoint_connection(Connection::Failed);
            Failed::Connect(error)
        })?;
        let reused = stream.reused;
        metrics.endpoint_connection(if reused { Connection::Reused } else { Connection::New });
        match attempt(job, address, stream).await {
            Err(Attempt::Refused) => metrics.endpoint_retried("stream_refused"),
            Err(Attempt::Failed(Failed::Early { executed: false, .. })) if reused => {
                metrics.endpoint_retried("kept_connection_closed");
            }
            Err(Attempt::Failed(Failed::Early { executed, .. })) => {
                failed = Failed::Early { executed, kept: reused };
                break;
            }
            Err(Attempt::Failed(failed)) => return Err(failed),
            Ok(answer) => return Ok(answer),
        }
    }
    Err(failed)
}

enum Attempt {
    /// The endpoint has not looked at it (RFC 9113 §8.7).
    Refused,
    Failed(Failed),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Failed(error.into())
    }
}

/// The rest of the request goes with the response, as over HTTP/1.1.
async fn attempt(
    job: &Job<'_>,
    address: SocketAddr,
    mut stream: Stream,
) -> Result<(ResponseHead, ResponseBody), Attempt> {
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
        error = fails(&sending, address) => return Err(error.into()),
        () = progress.overdue(job.request.times.first_byte) => return Err(Error::FirstByte(address).into()),
    };
    let (parts, body) = response
        .map_err(|error| {
            if is_refused(&error) {
                return Attempt::Refused;
            }
            // Bytes of other streams count, too: then it may have been this one's.
            let executed = before.zip(stream.acknowledged()).is_none_or(|(before, now)| now > before);
            Attempt::Failed(Failed::Early { executed, kept: false })
        })?
        .into_parts();
    let head = from_http2(parts, body.is_end_stream(), &job.request.parts.method, &job.head_limits())
        .map_err(|error| Error::Response { address, error })?;
    let body = Some(body).filter(|_| head.body != BodyKind::None);
    Ok((head, ResponseBody::Http2 { body, stream, sending, cut }))
}

/// The endpoint has not looked at the request (RFC 9113 §8.7), or it was never sent.
fn is_refused(error: &hyper::Error) -> bool {
    let http2 = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    // A GOAWAY of the endpoint's is an error of those streams alone that it names as not processed.
    let refused = http2.is_some_and(|error| {
        (error.reason() == Some(h2::Reason::REFUSED_STREAM) && error.is_remote())
            || (error.is_go_away() && error.is_remote())
    });
    // hyper cancels what it has not sent.
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
    // Whoever speaks HTTP/2 takes trailers, and gRPC asks for the word.
    head.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(length) = job.content.length() {
        head.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let uri = |authority: &str| Uri::builder().scheme("http").authority(authority).path_and_query(path).build();
    // An HTTP/1.0 client may have named no host.
    if let Ok(uri) = uri(host).or_else(|_| uri(&address.to_string())) {
        *head.uri_mut() = uri;
    }
    head
}

async fn send(sender: FrameSender, content: Content, progress: Progress, idle: Option<Duration>) -> Result<(), Unsent> {
    let mut pieces = content.pieces();
    while let Some(mut piece) = pieces.next().await.map_err(Unsent::Body)? {
        while !piece.is_empty() {
            let part = piece.split_to(piece.len().min(PIECE));
            taken(idle, sender.data(part)).await?;
            progress.made();
        }
    }
    taken(idle, sender.end(content.trailers().clone())).await?;
    progress.made();
    Ok(())
}
