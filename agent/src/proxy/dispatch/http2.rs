//! One request on one stream of an HTTP/2 connection, up to the head of its response.

use std::{error::Error as _, net::SocketAddr};

use http::{HeaderValue, Uri, Version, header};
use hyper::body::Body as _;

use super::{
    Failed, Written,
    body::{Pieces, length},
    within,
};
use crate::{
    endpoint::{body::ResponseBody, http2::Stream},
    error::Error,
    http::{
        frames::{FrameBody, FrameSender},
        head::HeadLimits,
        headers,
        response::{BodyKind, ResponseHead, from_http2},
    },
    metrics::Connection,
    picker::exchange::Body,
    proxy::Request,
    upload::Upload,
    worker::Worker,
};

/// How often a request that the endpoint has not looked at is sent again at once.
const REFUSALS: u32 = 3;

/// On a stream of its own. One that the endpoint refuses unseen, because it is about to close the connection or has too
/// much to do, is tried again, on another connection if the first is closing.
pub(super) async fn turn(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    address: SocketAddr,
    sent: &mut bool,
) -> Result<(ResponseHead, ResponseBody), Failed> {
    let metrics = &worker.shared.metrics;
    for _ in 0..REFUSALS {
        let stream = worker.http2_endpoints.stream(address).await.map_err(|error| {
            metrics.endpoint_connection(Connection::Failed);
            Failed::Connect(error)
        })?;
        metrics.endpoint_connection(if stream.reused { Connection::Reused } else { Connection::New });
        *sent = true;
        match attempt(worker, request, upload, body, address, stream).await {
            Err(Attempt::Refused) => metrics.endpoint_retried("stream_refused"),
            Err(Attempt::Failed(failed)) => return Err(failed),
            Ok(answer) => return Ok(answer),
        }
    }
    Err(Failed::Early)
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

async fn attempt(
    worker: &Worker,
    request: &Request,
    upload: &Upload,
    body: &Body,
    address: SocketAddr,
    mut stream: Stream,
) -> Result<(ResponseHead, ResponseBody), Attempt> {
    let limit = request.times.first_byte;
    let length = length(upload, body);
    let (sender, frames) = match length {
        Some(0) | None => (None, FrameBody::whole(bytes::Bytes::new())),
        Some(_) => {
            let (sender, frames) = FrameBody::written(length);
            (Some(sender), frames)
        }
    };
    let sent = stream.send.send_request(head(request, address, length).map(|()| frames));
    let send = async {
        if let Some(sender) = sender {
            match send(sender, upload, body).await {
                // Not the end: the endpoint may have answered and wants no more. What it sent tells.
                Ok(()) | Err(Written::Endpoint) => {}
                Err(Written::Body(error)) => return error,
            }
        }
        std::future::pending().await
    };
    let response = tokio::select! {
        biased;
        response = within(limit, sent) => response.ok_or(Error::FirstByte(address))?,
        error = send => return Err(Error::from(error).into()),
    };
    let (parts, body) = response.map_err(|error| failed(&error))?.into_parts();
    let limits = &worker.shared.config.limits;
    let limits = HeadLimits { bytes: limits.head_bytes, headers: limits.headers };
    let head = from_http2(parts, body.is_end_stream(), &request.parts.method, &limits)
        .map_err(|error| Error::Response { address, error })?;
    let body = Some(body).filter(|_| head.body != BodyKind::None);
    Ok((head, ResponseBody::Http2 { body, stream }))
}

/// Before its head a response has not begun, whatever ended the stream.
fn failed(error: &hyper::Error) -> Attempt {
    let http2 = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    // A GOAWAY of the endpoint's is an error of those streams alone that it names as not processed.
    let refused = http2.is_some_and(|error| {
        error.reason() == Some(h2::Reason::REFUSED_STREAM) || (error.is_go_away() && error.is_remote())
    });
    // hyper cancels what it has not sent.
    if refused || error.is_canceled() { Attempt::Refused } else { Attempt::Failed(Failed::Early) }
}

fn head(request: &Request, address: SocketAddr, length: Option<u64>) -> http::Request<()> {
    let parts = &request.parts;
    let own = [header::HOST, header::CONTENT_LENGTH, header::EXPECT, header::TRAILER];
    let fields = parts.headers.iter().filter(|(name, _)| !headers::is_hop_by_hop(name) && !own.contains(name));
    let mut head = http::Request::new(());
    *head.method_mut() = parts.method.clone();
    *head.version_mut() = Version::HTTP_2;
    head.headers_mut().extend(fields.map(|(name, value)| (name.clone(), value.clone())));
    // Whoever speaks HTTP/2 takes trailers, and gRPC asks for the word.
    head.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    if let Some(length) = length {
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

async fn send(sender: FrameSender, upload: &Upload, body: &Body) -> Result<(), Written> {
    let mut pieces = Pieces::new(upload, body);
    while let Some(piece) = pieces.next().await.map_err(Written::Body)? {
        sender.data(piece).await.map_err(|_| Written::Endpoint)?;
    }
    let trailers = if *body == Body::Original { upload.trailers.clone() } else { http::HeaderMap::new() };
    sender.end(trailers).await.map_err(|_| Written::Endpoint)
}
