//! Why an EPP did not pick. Every variant is a matter for the pool's failure mode.
//!
//! Given by the exchange (what the EPP said) and by the client (what became of the stream). An answer that the EPP meant for
//! the client is not among them: that is `Outcome::Immediate`.

use std::{io::ErrorKind, sync::Arc};

use crate::config::EppLimits;

#[derive(Debug, Clone, thiserror::Error)]
pub enum PickError {
    #[error("the EPP's name has no address: {0}")]
    Unresolved(Arc<str>),
    #[error("cannot connect to the EPP: {0}")]
    Connect(Arc<std::io::Error>),
    /// The EPP did not take the stream: its server is going away (GOAWAY), or refused it.
    #[error("the EPP did not take the stream: {0}")]
    NotTaken(String),
    /// The connection, or the stream alone, was lost before the EPP had answered.
    #[error("the stream to the EPP broke off: {message}")]
    Reset { message: String, answered: bool },
    #[error("the EPP answered with gRPC status {}: {message}", label(*.code))]
    Status { code: tonic::Code, message: String },
    #[error("the EPP closed the stream without a pick")]
    ClosedWithoutPick,
    #[error("the EPP answered without naming an endpoint")]
    NoDestination,
    /// The entries that are no `ip:port`.
    #[error("the EPP named what is no ip:port: {0}")]
    BadDestination(String),
    #[error("the EPP's replacement of the body is larger than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the EPP replaced only a part of the body")]
    BodyPartial,
    #[error("the EPP sets or removes more than {} fields or {} bytes besides those that the head has", limits.fields, limits.bytes)]
    MutationTooLarge { limits: EppLimits },
    #[error("the EPP sent more than {limit} messages without a decision")]
    TooManyMessages { limit: usize },
    #[error("the EPP sent more than {limit} bytes of dynamic metadata in one message")]
    MetadataTooLarge { limit: usize },
    #[error("the EPP answered the client with more than the limits allow")]
    ReplyTooLarge,
    /// And decided no other request meanwhile, or there was nobody to ask.
    #[error("the EPP did not answer in time")]
    Deadline,
    #[error("the EPP did not decide this request in time, but others meanwhile")]
    Held,
    /// Not asked: no replica has decided anything since a request waited in vain.
    #[error("the EPP has stalled, and is not waited for until it decides a request again")]
    Stalled,
}

impl PickError {
    /// A stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            PickError::Unresolved(_) => "unresolved",
            PickError::Connect(_) => "connect",
            PickError::NotTaken(_) => "not_taken",
            PickError::Reset { .. } => "reset",
            PickError::Status { code, .. } => label(*code),
            PickError::ClosedWithoutPick => "closed_without_pick",
            PickError::NoDestination => "no_destination",
            PickError::BadDestination(_) => "bad_destination",
            PickError::BodyTooLarge { .. } => "body_too_large",
            PickError::BodyPartial => "body_partial",
            PickError::MutationTooLarge { .. } => "mutation_too_large",
            PickError::TooManyMessages { .. } => "too_many_messages",
            PickError::MetadataTooLarge { .. } => "metadata_too_large",
            PickError::ReplyTooLarge => "reply_too_large",
            PickError::Deadline => "deadline",
            PickError::Held => "held",
            PickError::Stalled => "stalled",
        }
    }

    /// Whether the request can be asked again, and where. None of these is a decision, so nobody gets two.
    pub fn again(&self) -> Again {
        match self {
            PickError::NotTaken(_) => Again::Here,
            PickError::Reset { answered: false, .. } => Again::HereOnce,
            // The same loss, noticed while the connection was being made.
            PickError::Connect(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe
                ) =>
            {
                Again::HereOnce
            }
            PickError::Connect(_)
            | PickError::Reset { .. }
            | PickError::Status { code: tonic::Code::Unavailable, .. } => Again::Elsewhere,
            _ => Again::Not,
        }
    }
}

/// Where a request that got no decision can be asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Of the same replica, which has not seen it. The next stream does not meet a connection that is going away.
    Here,
    /// Of the same replica on a fresh connection, which the next stream gets: the transport was lost through no fault of this
    /// request. Once: it may have been.
    HereOnce,
    /// Of another replica.
    Elsewhere,
    /// This is the EPP's answer, or its time is over.
    Not,
}

/// The names of the gRPC specification, lower-case.
fn label(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
