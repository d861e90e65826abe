//! One gRPC stream on an HTTP/2 connection, without a task or a channel of its own.
//!
//! Takes messages and sends those that are given together in one DATA frame; returns the peer's messages and how its side of the
//! stream ended. Flow control: the stream takes more while the peer's window has room for a byte. Dropping the stream resets it,
//! unless both sides have ended.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header};
use prost::Message;
use tonic::{Code, Status};

/// The compression flag and the length before each message.
const PREFIX: usize = 5;
/// Longest answer to a call with one message in each direction.
const UNARY: usize = 1 << 16;

/// How the peer's side of a stream ended.
#[derive(Debug)]
pub(super) enum PeerEnd {
    /// With status OK, after whole messages.
    Closed,
    /// Without a status, or within a message.
    Unclean(&'static str),
    /// With another status, or with bytes that are not gRPC.
    Status(Status),
    /// The stream or its connection was lost.
    Lost(h2::Error),
}

pub(super) struct GrpcStream {
    /// `None` once this side has ended.
    sending: Option<SendStream<Bytes>>,
    receiving: Receiving,
    /// Bytes of messages that are not complete.
    buffer: BytesMut,
    /// Longest message in bytes.
    limit: usize,
}

enum Receiving {
    Head(ResponseFuture),
    Messages(RecvStream),
    Over,
}

impl GrpcStream {
    /// Opens a stream about the method at `uri`.
    pub(super) fn open(http2: &mut SendRequest<Bytes>, uri: Uri, limit: usize) -> Result<Self, h2::Error> {
        let mut request = Request::new(());
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = http::Version::HTTP_2;
        *request.uri_mut() = uri;
        let fields = [
            (header::TE, "trailers"),
            (header::CONTENT_TYPE, "application/grpc"),
            (header::USER_AGENT, concat!("penstock/", env!("CARGO_PKG_VERSION"))),
        ];
        for (name, value) in fields {
            request.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        let (response, sending) = http2.send_request(request, false)?;
        Ok(Self { sending: Some(sending), receiving: Receiving::Head(response), buffer: BytesMut::new(), limit })
    }

    /// Ready when the peer takes another message: `false` if this side has ended or the stream was lost, of which
    /// [`poll_message`](Self::poll_message) tells the reason.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(sending) = &mut self.sending else { return Poll::Ready(false) };
        if sending.capacity() > 0 {
            return Poll::Ready(true);
        }
        sending.reserve_capacity(1);
        while sending.capacity() == 0 {
            match ready!(sending.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(false),
            }
        }
        Poll::Ready(true)
    }

    /// Sends encoded messages. `end` ends this side.
    pub(super) fn send(&mut self, messages: Bytes, end: bool) {
        if let Some(sending) = &mut self.sending {
            // An error means that the stream was lost; the receiving side has the reason.
            let sent = sending.send_data(messages, end);
            if end || sent.is_err() {
                self.sending = None;
            }
        }
    }

    /// The next message, or how the peer's side ended. Must not be called after the end.
    pub(super) fn poll_message<M: Message + Default>(&mut self, cx: &mut Context<'_>) -> Poll<Result<M, PeerEnd>> {
        loop {
            match self.take_message() {
                Ok(Some(message)) => return Poll::Ready(Ok(message)),
                Ok(None) => {}
                Err(status) => return Poll::Ready(Err(self.over(PeerEnd::Status(status)))),
            }
            if let Some(mut end) = ready!(self.poll_bytes(cx)) {
                if matches!(end, PeerEnd::Closed) && !self.buffer.is_empty() {
                    end = PeerEnd::Unclean("the stream ended within a message");
                }
                return Poll::Ready(Err(self.over(end)));
            }
        }
    }

    /// Ends this side orderly, too, unless the stream is gone.
    fn over(&mut self, end: PeerEnd) -> PeerEnd {
        self.receiving = Receiving::Over;
        match end {
            PeerEnd::Closed => self.send(Bytes::new(), true),
            PeerEnd::Lost(_) => self.sending = None,
            // The rest of the peer's side is not read.
            PeerEnd::Status(_) | PeerEnd::Unclean(_) => {}
        }
        end
    }

    fn take_message<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        let Some((prefix, rest)) = self.buffer.split_at_checked(PREFIX) else { return Ok(None) };
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if prefix[0] != 0 {
            return Err(Status::internal(format!("the message has the compression flag {}", prefix[0])));
        }
        if length > self.limit {
            return Err(Status::out_of_range(format!("the message has {length} bytes, more than {}", self.limit)));
        }
        if rest.len() < length {
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        let message = M::decode(self.buffer.split_to(length).freeze());
        message.map(Some).map_err(|error| Status::internal(format!("the message cannot be decoded: {error}")))
    }

    /// Receives the head or more bytes, or the end.
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<PeerEnd>> {
        match &mut self.receiving {
            Receiving::Head(response) => match ready!(Pin::new(response).poll(cx)) {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    // A failure without a message has its status in the head.
                    if let Some(status) = Status::from_header_map(&head.headers) {
                        return Poll::Ready(Some(ended(status)));
                    }
                    // Such as the error page of a proxy in front of the peer.
                    let kind = head.headers.get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
                    if head.status != StatusCode::OK || !kind.starts_with(b"application/grpc") {
                        return Poll::Ready(Some(PeerEnd::Status(not_grpc(head.status, kind))));
                    }
                    self.receiving = Receiving::Messages(body);
                    Poll::Ready(None)
                }
                Err(error) => Poll::Ready(Some(PeerEnd::Lost(error))),
            },
            Receiving::Messages(body) => match ready!(body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Fails if the stream is closed, which the next call tells.
                    let _ = body.flow_control().release_capacity(data.len());
                    self.buffer.put(data);
                    Poll::Ready(None)
                }
                // Also a reset with NO_ERROR or CANCEL: without a status it is not known what the peer would have sent. One that
                // follows a whole answer (RFC 9113 §8.1) is not read.
                Some(Err(error)) => Poll::Ready(Some(PeerEnd::Lost(error))),
                None => match ready!(body.poll_trailers(cx)) {
                    Ok(trailers) => Poll::Ready(Some(end_of(trailers.as_ref()))),
                    Err(error) => Poll::Ready(Some(PeerEnd::Lost(error))),
                },
            },
            Receiving::Over => Poll::Ready(Some(PeerEnd::Closed)),
        }
    }
}

impl Drop for GrpcStream {
    fn drop(&mut self) {
        // Otherwise an end could look orderly.
        if let Some(sending) = &mut self.sending {
            sending.send_reset(Reason::CANCEL);
        }
    }
}

/// Appends a message with its prefix.
pub(super) fn encode(message: &impl Message, out: &mut BytesMut) {
    let length = message.encoded_len();
    out.reserve(PREFIX + length);
    out.put_u8(0);
    // Bodies are sent in pieces, so that no message is longer.
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // Cannot fail: the buffer grows.
    let _ = message.encode(out);
}

/// Calls a method with one message in each direction. Without an answer the result is how the stream ended.
pub(super) async fn unary<M: Message + Default>(
    http2: &mut SendRequest<Bytes>,
    uri: Uri,
    request: &impl Message,
) -> Result<M, PeerEnd> {
    let mut stream = GrpcStream::open(http2, uri, UNARY).map_err(PeerEnd::Lost)?;
    let mut encoded = BytesMut::new();
    encode(request, &mut encoded);
    // If the stream is lost, the answer tells why.
    poll_fn(|cx| stream.poll_ready(cx)).await;
    stream.send(encoded.freeze(), true);
    let answer = poll_fn(|cx| stream.poll_message(cx)).await?;
    match poll_fn(|cx| stream.poll_message::<M>(cx)).await {
        Err(PeerEnd::Closed) | Ok(_) => Ok(answer),
        Err(end) => Err(end),
    }
}

fn ended(status: Status) -> PeerEnd {
    if status.code() == Code::Ok { PeerEnd::Closed } else { PeerEnd::Status(status) }
}

/// How a stream ended by its trailers. A stream without a status has failed (gRPC over HTTP/2, "Responses").
fn end_of(trailers: Option<&HeaderMap>) -> PeerEnd {
    let status = trailers.and_then(Status::from_header_map);
    status.map_or(PeerEnd::Unclean("the stream ended without a grpc-status"), ended)
}

/// The status of a response that is not gRPC's, by its HTTP status (gRPC's "HTTP to gRPC Status Code Mapping").
fn not_grpc(head: StatusCode, kind: &[u8]) -> Status {
    let code = match head {
        StatusCode::BAD_REQUEST => Code::Internal,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND => Code::Unimplemented,
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Code::Unavailable,
        _ => Code::Unknown,
    };
    let kind = String::from_utf8_lossy(kind);
    Status::new(code, format!("found HTTP status {head} with content-type \"{kind}\", expected a gRPC response"))
}
