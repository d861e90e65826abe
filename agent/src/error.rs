//! Why a request was not answered by an endpoint: one list, and the one place that turns it into a status, a label and a
//! body.
//!
//! The body has the shape that OpenAI's clients read: `{"error": {"message", "type", "code"}}`. `code` is the label that
//! metrics and the access log use.

use std::{io, net::SocketAddr};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use thiserror::Error;

use crate::{
    bbr::JsonError,
    http::{body::BodyError, reply::Reply, request::RequestError, response::ResponseError},
    picker::{builtin::NoEndpoint, error::PickError, exchange::ImmediateReply},
};

#[derive(Debug, Error)]
pub enum Error {
    #[error("{0}")]
    Request(#[from] RequestError),
    #[error("{0}")]
    Body(#[from] BodyError),
    #[error("the body is not JSON that can be routed: {0}")]
    Json(#[from] JsonError),
    #[error("the body ended after {found} bytes, before the end that its head declares")]
    BodyCut { found: u64 },
    #[error("the connection ended inside a request head")]
    HeadCut,
    #[error("the request head did not end within {0:?}")]
    HeadTimeout(std::time::Duration),
    #[error("the request body did not end within {0:?}")]
    BodyTimeout(std::time::Duration),
    #[error("no route matches this host, path and model")]
    NoRoute,
    #[error("the endpoint picker failed: {0}")]
    Picker(#[from] PickError),
    #[error("the endpoint picker named {0}, which is not in the pool or takes no new requests")]
    Stranger(SocketAddr),
    #[error("the pool has no endpoint for this request: {0}")]
    NoEndpoint(#[from] NoEndpoint),
    #[error("none of the endpoints picked can be reached; the last was {address}: {error}")]
    Connect { address: SocketAddr, error: io::Error },
    #[error("the endpoint {0} closed the connection before it answered")]
    EndpointClosed(SocketAddr),
    #[error("the endpoint {0} did not answer in time")]
    FirstByte(SocketAddr),
    #[error("the endpoint {address} answered with what is no response: {error}")]
    Response { address: SocketAddr, error: ResponseError },
    /// The picker took its decision back; its own answer goes to the client.
    #[error("the endpoint picker evicted the request: {}", .0.details)]
    Evicted(Box<ImmediateReply>),
    /// Nobody is there to read an answer.
    #[error("the client left")]
    ClientGone,
}

impl Error {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Request(error) => error.status(),
            Self::Body(error) => error.status(),
            Self::Json(_) | Self::BodyCut { .. } | Self::HeadCut => StatusCode::BAD_REQUEST,
            Self::HeadTimeout(_) | Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Picker(_) | Self::NoEndpoint(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Stranger(_) | Self::Connect { .. } | Self::EndpointClosed(_) | Self::Response { .. } => {
                StatusCode::BAD_GATEWAY
            }
            Self::FirstByte(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Evicted(reply) => reply.status,
            // Never sent; nginx's number for it, so that the metric says what happened.
            Self::ClientGone => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        }
    }

    /// Label for metrics and logs, and `code` of the body.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Request(error) => error.reason(),
            Self::Body(error) => error.reason(),
            Self::Json(_) => "json",
            Self::BodyCut { .. } => "body_cut",
            Self::HeadCut => "head_cut",
            Self::HeadTimeout(_) => "head_timeout",
            Self::BodyTimeout(_) => "body_timeout",
            Self::NoRoute => "no_route",
            Self::Picker(_) => "picker_failed",
            Self::Stranger(_) => "endpoint_not_in_pool",
            Self::NoEndpoint(NoEndpoint::NoneEligible) => "no_endpoint",
            Self::NoEndpoint(NoEndpoint::Saturated) => "endpoints_saturated",
            Self::Connect { .. } => "connect",
            Self::EndpointClosed(_) => "endpoint_closed",
            Self::FirstByte(_) => "first_byte_timeout",
            Self::Response { .. } => "bad_response",
            Self::Evicted(_) => "evicted",
            Self::ClientGone => "client_gone",
        }
    }

    /// The whole answer.
    pub fn reply(&self) -> Reply {
        let status = self.status();
        let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
        let body = serde_json::json!({
            "error": { "message": self.to_string(), "type": kind, "param": null, "code": self.reason() }
        });
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        Reply { status, headers, body: Bytes::from(body.to_string()) }
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use http::Method;

    use super::*;

    #[test]
    fn an_answer_is_json_with_the_label() {
        let mut out = BytesMut::new();
        Error::BodyCut { found: 3 }.reply().write(&mut out, &Method::POST, false);
        let text = String::from_utf8(out.to_vec()).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n") && head.contains("connection: close"), "{head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).expect("json");
        assert_eq!(body["error"]["code"], "body_cut");
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }
}
