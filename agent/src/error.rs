//! Why a request was not answered by an endpoint: one list, and the one place that turns it into a status, a label and a
//! body.
//!
//! The body has the shape that OpenAI's clients read, `{"error": {"message", "type", "param", "code"}}`, or is plain text where
//! that is configured or the client would rather have it. The label that metrics and the access log use is in both, and in
//! the field `x-penstock-reason`. `docs/errors.md` has all of them; a test holds it to this file.

use std::{cmp::Ordering, io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use thiserror::Error;

use crate::{
    bbr::NamingError,
    config::{Config, ErrorFormat},
    http::{
        accept,
        body::BodyError,
        coding, headers,
        reply::{Reply, is_grpc},
        request::RequestError,
        response::ResponseError,
    },
    picker::{builtin::NoEndpoint, error::PickError, exchange::ImmediateReply},
};

#[derive(Debug, Error)]
pub enum Error {
    #[error("{0}")]
    Request(#[from] RequestError),
    #[error("{0}")]
    Body(#[from] BodyError),
    #[error("{0}")]
    Naming(#[from] NamingError),
    #[error("the body ended after {found} bytes, before the end that its head declares")]
    BodyCut { found: u64 },
    #[error("the connection ended inside a request head")]
    HeadCut,
    #[error("the request head did not end within {0:?}")]
    HeadTimeout(Duration),
    #[error("no byte of the request body came within {0:?}")]
    BodyTimeout(Duration),
    #[error("the request body came with less than {0} bytes a second")]
    BodySlow(u64),
    #[error("the request was not answered within {0:?}")]
    RequestTimeout(Duration),
    #[error("no route matches this request")]
    NoRoute,
    #[error("the endpoint picker failed: {0}")]
    Picker(#[from] PickError),
    #[error("the endpoint picker named {0}, which is not in the pool or takes no new requests")]
    Stranger(SocketAddr),
    #[error("the pool has no endpoint for this request: {0}")]
    NoEndpoint(#[from] NoEndpoint),
    #[error("none of the endpoints picked can be reached; the last was {address}: {error}")]
    Connect { address: SocketAddr, error: io::Error },
    #[error("the agent cannot connect to endpoints; the last was {address}: {error}")]
    LocalFault { address: SocketAddr, error: io::Error },
    #[error("the endpoint {address} took nothing of the request for {limit:?}")]
    RequestStalled { address: SocketAddr, limit: Duration },
    #[error("the endpoint {0} closed the connection before it answered")]
    EndpointClosed(SocketAddr),
    #[error("the endpoint {0} did not answer in time")]
    FirstByte(SocketAddr),
    #[error("the endpoint {address} answered with what is no response: {error}")]
    Response { address: SocketAddr, error: ResponseError },
    #[error("the request has been forwarded by this agent before")]
    Loop,
    #[error("the endpoint {0} is one of this agent's own listeners")]
    OwnListener(SocketAddr),
    /// The picker took its decision back; its own answer goes to the client.
    #[error("the endpoint picker evicted the request: {}", .0.details)]
    Evicted(Box<ImmediateReply>),
    #[error("the agent has as many connections as it takes")]
    TooManyConnections,
    #[error("the agent failed while it processed the request")]
    Panicked,
    /// Nobody is there to read an answer.
    #[error("the client left")]
    ClientGone,
}

impl Error {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Request(error) => error.status(),
            Self::Body(error) => error.status(),
            Self::Naming(error) => error.status(),
            Self::BodyCut { .. } | Self::HeadCut => StatusCode::BAD_REQUEST,
            Self::HeadTimeout(_) | Self::BodyTimeout(_) | Self::BodySlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Picker(_) | Self::NoEndpoint(_) | Self::LocalFault { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Connect { error, .. } if error.kind() == io::ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Stranger(_) | Self::Connect { .. } | Self::EndpointClosed(_) | Self::Response { .. } => {
                StatusCode::BAD_GATEWAY
            }
            Self::FirstByte(_) | Self::RequestStalled { .. } | Self::RequestTimeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Loop | Self::OwnListener(_) => StatusCode::LOOP_DETECTED,
            Self::Evicted(reply) => reply.status,
            Self::TooManyConnections => StatusCode::SERVICE_UNAVAILABLE,
            Self::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
            // Never sent; nginx's number for it, so that the metric says what happened.
            Self::ClientGone => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        }
    }

    /// Label for metrics and logs, and `code` of the body.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Request(error) => error.reason(),
            Self::Body(error) => error.reason(),
            Self::Naming(error) => error.reason(),
            Self::BodyCut { .. } => "body_cut",
            Self::HeadCut => "head_cut",
            Self::HeadTimeout(_) => "head_timeout",
            Self::BodyTimeout(_) | Self::BodySlow(_) => "body_timeout",
            Self::RequestTimeout(_) => "request_timeout",
            Self::NoRoute => "no_route",
            Self::Picker(_) => "picker_failed",
            Self::Stranger(_) => "endpoint_not_in_pool",
            Self::NoEndpoint(NoEndpoint::NoneEligible) => "no_endpoint",
            Self::NoEndpoint(NoEndpoint::Saturated) => "endpoints_saturated",
            Self::Connect { error, .. } if error.kind() == io::ErrorKind::TimedOut => "connect_timeout",
            Self::Connect { .. } => "connect",
            Self::LocalFault { .. } => "local_fault",
            Self::RequestStalled { .. } => "request_stalled",
            Self::EndpointClosed(_) => "endpoint_closed",
            Self::FirstByte(_) => "first_byte_timeout",
            Self::Response { .. } => "bad_response",
            Self::Loop => "loop",
            Self::OwnListener(_) => "own_listener",
            Self::Evicted(_) => "evicted",
            Self::TooManyConnections => "too_many_connections",
            Self::Panicked => "internal_error",
            Self::ClientGone => "client_gone",
        }
    }

    /// The whole answer.
    pub fn reply(&self, manner: &Manner<'_>) -> Reply {
        let (status, reason) = (self.status(), self.reason());
        let (content_type, body) = match manner.format {
            ErrorFormat::OpenAi if manner.anthropic => {
                let error = serde_json::json!({ "type": anthropic_type(status), "message": self.to_string() });
                let id = manner.own_id.and_then(|id| id.to_str().ok());
                let body = serde_json::json!({ "type": "error", "error": error, "request_id": id });
                ("application/json", body.to_string())
            }
            ErrorFormat::OpenAi => {
                let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
                let error =
                    serde_json::json!({ "message": self.to_string(), "type": kind, "param": null, "code": reason });
                ("application/json", serde_json::json!({ "error": error }).to_string())
            }
            ErrorFormat::Plain => ("text/plain; charset=utf-8", format!("{self}\nreason: {reason}\n")),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(headers::X_PENSTOCK_REASON, HeaderValue::from_static(reason));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // RFC 9110 §12.5.3: what a request may be coded with.
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(coding::ACCEPTED));
        }
        manner.mark(&mut headers);
        let reply = Reply { status, headers, body: Bytes::from(body) };
        if manner.grpc { reply.grpc(&self.to_string()) } else { reply }
    }
}

/// How the client of a request is to be answered by the agent itself.
#[derive(Debug, Clone, Copy)]
pub struct Manner<'r> {
    format: ErrorFormat,
    /// The request is one of gRPC.
    pub grpc: bool,
    /// JSON has the shape of Anthropic's API.
    anthropic: bool,
    /// Where the client is to learn it in a field.
    request_id: Option<&'r HeaderValue>,
    own_id: Option<&'r HeaderValue>,
}

impl<'r> Manner<'r> {
    /// By the fields of its request.
    pub fn of(request: &'r HeaderMap, config: &Config) -> Self {
        let format = match accept::compare(request, "text/plain", "application/json") {
            Ordering::Greater => ErrorFormat::Plain,
            Ordering::Less => ErrorFormat::OpenAi,
            Ordering::Equal => config.errors.format,
        };
        let request_id = headers::request_id(request, &config.headers);
        let own_id = request.get(headers::X_REQUEST_ID);
        Self { format, grpc: is_grpc(request), anthropic: false, request_id, own_id }
    }

    /// In the shape of the API that the path belongs to.
    #[must_use]
    pub fn at(self, path: &str) -> Self {
        Self { anthropic: is_messages(path), ..self }
    }

    /// Where the head of the request could not be read.
    pub fn unknown(config: &Config) -> Self {
        Self { format: config.errors.format, grpc: false, anthropic: false, request_id: None, own_id: None }
    }

    /// Adds what any answer has, the picker's included.
    pub fn mark(&self, answer: &mut HeaderMap) {
        if let Some(id) = self.request_id {
            answer.insert(headers::X_REQUEST_ID, id.clone());
        }
    }
}

/// Whether it is the path of Anthropic's messages, or of what lies below them: `/v1/messages`, `/v1/messages/count_tokens`, with
/// any prefix.
fn is_messages(path: &str) -> bool {
    let path = path.split('?').next().unwrap_or_default();
    let mut before = "";
    path.split('/').any(|segment| std::mem::replace(&mut before, segment) == "v1" && segment == "messages")
}

/// `error.type` of Anthropic's API.
fn anthropic_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

#[cfg(test)]
mod tests;
