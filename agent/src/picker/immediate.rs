//! An EPP's immediate reply: takes the message, whose size was checked, and returns what the client gets.

use bytes::Bytes;
use http::StatusCode;
use penstock_proto::ext_proc::{HeaderMutation, ImmediateResponse};

use super::message;

/// The EPP's immediate reply to the client. After a decision it is an eviction.
#[derive(Debug, Clone, PartialEq)]
pub struct ImmediateReply {
    pub status: StatusCode,
    pub headers: HeaderMutation,
    pub body: Bytes,
    /// What a gRPC client gets instead of the code that follows from `status`.
    pub grpc_status: Option<u16>,
    /// For the log.
    pub details: String,
}

/// The last code that gRPC defines.
const LAST_CODE: u16 = 16;
/// The header in which an EPP says why it does not serve a request.
const DROPPED_REASON: &str = "x-llm-d-request-dropped-reason";

impl ImmediateReply {
    /// Why the EPP does not serve the request, in its own words.
    pub fn dropped_reason(&self) -> Option<String> {
        let set = self.headers.set_headers.iter().filter_map(|set| set.header.as_ref());
        let reason = set.rev().find(|header| header.key.eq_ignore_ascii_case(DROPPED_REASON))?;
        Some(String::from_utf8_lossy(message::value(reason)).into_owned())
    }
}

impl From<ImmediateResponse> for ImmediateReply {
    fn from(reply: ImmediateResponse) -> Self {
        let code = reply.status.and_then(|status| u16::try_from(status.code).ok());
        // Only a final status is accepted; otherwise 500. (Envoy sends 200 or an invalid status then.)
        let status = code
            .and_then(|code| StatusCode::from_u16(code).ok())
            .filter(|status| (200..600).contains(&status.as_u16()));
        let grpc_status = reply.grpc_status.and_then(|status| u16::try_from(status.status).ok());
        Self {
            status: status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            headers: reply.headers.unwrap_or_default(),
            body: reply.body,
            grpc_status: grpc_status.filter(|code| *code <= LAST_CODE),
            details: reply.details,
        }
    }
}
