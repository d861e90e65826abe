//! The reasons why a request was not answered by an endpoint, and the only place that maps them to a status, a label
//! and a body.
//!
//! The body has the shape that OpenAI clients expect, `{"error": {"message", "type", "param", "code"}}`, or is plain
//! text if that is configured or the client prefers it. The label used by metrics and the access log is also in the
//! body and in the header `x-penstock-reason`. `docs/errors.md` lists all reasons; a test compares it with this file.

use std::{cmp::Ordering, io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use thiserror::Error;

use crate::{
    bbr::NamingError,
    config::{Config, Cors, ErrorFormat, RefusedRoute, UnusablePool},
    http::{
        accept,
        body::BodyError,
        coding,
        cors::Grant,
        fields, headers,
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
    #[error("the body ended after {found} bytes, earlier than its head declares")]
    BodyCut { found: u64 },
    #[error("the connection ended inside a request head")]
    HeadCut,
    #[error("the request head did not end within {0:?}")]
    HeadTimeout(Duration),
    #[error("no byte of the request body arrived within {0:?}")]
    BodyTimeout(Duration),
    #[error("the request body arrived at less than {0} bytes per second")]
    BodySlow(u64),
    #[error("the request was not answered within {0:?}")]
    RequestTimeout(Duration),
    #[error("no route matches this request")]
    NoRoute,
    /// The route answers with a redirect.
    #[error("redirected to {}", String::from_utf8_lossy(.location.as_bytes()))]
    Redirected { status: StatusCode, location: HeaderValue },
    #[error("{0}")]
    Route(RefusedRoute),
    #[error("{0}")]
    Pool(#[from] UnusablePool),
    #[error("the endpoint picker failed: {0}")]
    Picker(#[from] PickError),
    #[error("the endpoint picker chose {0}, which is not in the pool or takes no new requests")]
    Stranger(SocketAddr),
    #[error("the pool has no endpoint for this request: {0}")]
    NoEndpoint(#[from] NoEndpoint),
    #[error("none of the picked endpoints can be reached; the last was {address}: {error}")]
    Connect { address: SocketAddr, error: io::Error },
    #[error("the TLS handshake with none of the picked endpoints succeeded; the last was {address}: {error}")]
    EndpointTls { address: SocketAddr, error: io::Error },
    #[error("the agent cannot open connections to endpoints; the last was {address}: {error}")]
    LocalFault { address: SocketAddr, error: io::Error },
    #[error("the endpoint {address} accepted no byte of the request for {limit:?}")]
    RequestStalled { address: SocketAddr, limit: Duration },
    #[error("the endpoint {0} closed the connection before it answered")]
    EndpointClosed(SocketAddr),
    #[error("the endpoint {0} did not answer in time")]
    FirstByte(SocketAddr),
    #[error("the endpoint {address} sent an invalid HTTP response: {error}")]
    Response { address: SocketAddr, error: ResponseError },
    #[error("loop detected: this agent has already forwarded the request")]
    Loop,
    #[error("the endpoint {0} is one of this agent's own listeners")]
    OwnListener(SocketAddr),
    /// The picker revoked its decision; its own answer goes to the client.
    #[error("the endpoint picker evicted the request: {}", .0.details)]
    Evicted(Box<ImmediateReply>),
    #[error("the agent has reached its limit of connections")]
    TooManyConnections,
    #[error("the agent stopped before the request was answered")]
    Stopped,
    #[error("internal error while processing the request")]
    Panicked,
    /// Not sent, because the client is gone.
    #[error("the client disconnected")]
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
            Self::NoRoute | Self::Route(RefusedRoute::NoRoute) => StatusCode::NOT_FOUND,
            Self::Redirected { status, .. } => *status,
            Self::Route(RefusedRoute::Unsupported(_) | RefusedRoute::Backend(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Route(RefusedRoute::Unread(_) | RefusedRoute::Absent(_))
            | Self::Pool(_)
            | Self::Picker(_)
            | Self::NoEndpoint(_)
            | Self::LocalFault { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Connect { error, .. } if error.kind() == io::ErrorKind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Stranger(_)
            | Self::Connect { .. }
            | Self::EndpointTls { .. }
            | Self::EndpointClosed(_)
            | Self::Response { .. } => StatusCode::BAD_GATEWAY,
            Self::FirstByte(_) | Self::RequestStalled { .. } | Self::RequestTimeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Loop | Self::OwnListener(_) => StatusCode::LOOP_DETECTED,
            Self::Evicted(reply) => reply.status,
            Self::TooManyConnections | Self::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            Self::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
            // Never sent. nginx's status for this case, so that the metric shows it.
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
            Self::NoRoute | Self::Route(RefusedRoute::NoRoute) => "no_route",
            Self::Redirected { .. } => "redirected",
            Self::Route(RefusedRoute::Unread(_)) => "routes_unread",
            Self::Route(RefusedRoute::Unsupported(_)) => "route_unsupported",
            Self::Route(RefusedRoute::Backend(_)) => "backend_invalid",
            Self::Pool(UnusablePool::Unread(_)) => "pool_unread",
            Self::Pool(UnusablePool::Absent(_)) | Self::Route(RefusedRoute::Absent(_)) => "pool_absent",
            Self::Pool(UnusablePool::Invalid(..)) => "pool_invalid",
            Self::Picker(_) => "picker_failed",
            Self::Stranger(_) => "endpoint_not_in_pool",
            Self::NoEndpoint(NoEndpoint::NoneEligible) => "no_endpoint",
            Self::NoEndpoint(NoEndpoint::Saturated) => "endpoints_saturated",
            Self::Connect { error, .. } if error.kind() == io::ErrorKind::TimedOut => "connect_timeout",
            Self::Connect { .. } => "connect",
            Self::EndpointTls { .. } => "endpoint_tls",
            Self::LocalFault { .. } => "local_fault",
            Self::RequestStalled { .. } => "request_stalled",
            Self::EndpointClosed(_) => "endpoint_closed",
            Self::FirstByte(_) => "first_byte_timeout",
            Self::Response { .. } => "bad_response",
            Self::Loop => "loop",
            Self::OwnListener(_) => "own_listener",
            Self::Evicted(_) => "evicted",
            Self::TooManyConnections => "too_many_connections",
            Self::Stopped => "agent_stopped",
            Self::Panicked => "internal_error",
            Self::ClientGone => "client_gone",
        }
    }

    /// Builds the whole answer.
    pub fn reply(&self, manner: &Manner<'_>) -> Reply {
        let (status, reason) = (self.status(), self.reason());
        if let Self::Redirected { location, .. } = self {
            return redirect(status, location, manner);
        }
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
        headers.insert(fields::X_PENSTOCK_REASON, HeaderValue::from_static(reason));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
            // The codings that a request may use (RFC 9110 §12.5.3).
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(coding::ACCEPTED));
        }
        manner.mark(&mut headers);
        let reply = Reply { status, headers, body: Bytes::from(body) };
        if manner.grpc { reply.grpc(&self.to_string()) } else { reply }
    }
}

/// A redirect has no body.
fn redirect(status: StatusCode, location: &HeaderValue, manner: &Manner<'_>) -> Reply {
    let mut headers = HeaderMap::new();
    headers.insert(header::LOCATION, location.clone());
    manner.mark(&mut headers);
    Reply { status, headers, body: Bytes::new() }
}

/// How the agent's own answer to a request is formatted.
#[derive(Debug, Clone, Copy)]
pub struct Manner<'r> {
    format: ErrorFormat,
    /// The request is a gRPC request.
    pub grpc: bool,
    /// JSON bodies have the shape of Anthropic's API.
    anthropic: bool,
    /// The request id, if clients get it in a header.
    request_id: Option<&'r HeaderValue>,
    own_id: Option<&'r HeaderValue>,
    /// What the answer tells a page of another origin.
    grant: Option<(&'r Cors, &'r Grant)>,
}

impl<'r> Manner<'r> {
    /// Determines the format from the headers of a request.
    pub fn of(request: &'r HeaderMap, config: &Config) -> Self {
        let format = match accept::compare(request, "text/plain", "application/json") {
            Ordering::Greater => ErrorFormat::Plain,
            Ordering::Less => ErrorFormat::OpenAi,
            Ordering::Equal => config.errors.format,
        };
        let request_id = headers::request_id(request, &config.headers);
        let own_id = request.get(headers::X_REQUEST_ID);
        Self { format, grpc: is_grpc(request), anthropic: false, request_id, own_id, grant: None }
    }

    /// Uses the error shape of the API that `path` belongs to.
    #[must_use]
    pub fn at(self, path: &str) -> Self {
        Self { anthropic: is_messages(path), ..self }
    }

    /// Sets what the answer tells a page of another origin.
    #[must_use]
    pub fn to(self, cors: Option<&'r Cors>, grant: Option<&'r Grant>) -> Self {
        Self { grant: cors.zip(grant), ..self }
    }

    /// The format for a request whose head could not be read.
    pub fn unknown(config: &Config) -> Self {
        let (request_id, own_id, grant) = (None, None, None);
        Self { format: config.errors.format, grpc: false, anthropic: false, request_id, own_id, grant }
    }

    /// Adds the headers that every answer has, including the picker's.
    pub fn mark(&self, answer: &mut HeaderMap) {
        if let Some(id) = self.request_id {
            answer.insert(headers::X_REQUEST_ID, id.clone());
        }
        if let Some((cors, grant)) = self.grant {
            grant.apply(cors, answer);
        }
    }
}

/// Whether `path` is `/v1/messages` of Anthropic's API or below it, such as `/v1/messages/count_tokens`, with any
/// prefix.
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
