//! Why an EPP did not pick, from the exchange (the EPP's messages) and the client (the stream). The pool's failure mode handles
//! every variant. An EPP's immediate reply is not an error: see `Outcome::Immediate`.

use std::sync::Arc;

use super::connection::is_loss;
use crate::{config::EppLimits, endpoint::local_fault::local_fault};

/// Why an EPP did not pick.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PickError {
    /// No address of the EPP is known so far, or its names cannot be resolved; the reason.
    #[error("cannot resolve the EPP's name: {0}")]
    Unresolved(Arc<str>),
    /// The Kubernetes Service of the EPP has no replica that is ready; the reason.
    #[error("{0}")]
    NoReplica(Arc<str>),
    /// No connection was made: TCP, TLS or HTTP/2 failed or timed out.
    #[error("cannot connect to the EPP: {0}")]
    Connect(Arc<std::io::Error>),
    /// No connection was made because of this machine: it has run out of descriptors, ports or memory, or a local policy forbids it.
    #[error("the agent cannot open connections to the EPP: {0}")]
    LocalFault(Arc<std::io::Error>),
    /// The server sent GOAWAY or refused the stream.
    #[error("the EPP did not process the stream: {0}")]
    NotTaken(String),
    /// The connection or the stream was lost.
    #[error("lost the stream to the EPP: {message}")]
    Reset {
        /// The transport's text.
        message: String,
        /// The EPP had already said something about the request.
        answered: bool,
    },
    /// The stream ended with an error of the EPP, or of a proxy in front of it.
    #[error("the EPP answered with gRPC status {}: {message}", label(*.code))]
    Status {
        /// `grpc-status`, or the code of the HTTP status if the response is not gRPC's.
        code: tonic::Code,
        /// `grpc-message`, or a text of the client's.
        message: String,
    },
    /// The stream ended with `OK` before there was a decision.
    #[error("the EPP closed the stream without a pick")]
    ClosedWithoutPick,
    /// The decision names no endpoint, neither as header nor as metadata.
    #[error("the EPP replied without an endpoint")]
    NoDestination,
    /// The invalid entries.
    #[error("the EPP returned an invalid ip:port: {0}")]
    BadDestination(String),
    /// A body of the EPP for the endpoint is too large.
    #[error("the EPP's replacement of the body is larger than {limit} bytes")]
    BodyTooLarge {
        /// `limits.body_bytes`.
        limit: usize,
    },
    /// The EPP ended its replacement early, or replaced some pieces of the body and kept others.
    #[error("the EPP replaced only part of the body")]
    BodyPartial,
    /// The mutation of the request's head has too many fields or bytes.
    #[error("the EPP's mutation exceeds the head's own fields by more than {} fields or {} bytes", limits.fields, limits.bytes)]
    MutationTooLarge {
        /// The limits of the pool's EPP.
        limits: EppLimits,
    },
    /// The EPP keeps sending without deciding.
    #[error("the EPP sent more than {limit} messages without a decision")]
    TooManyMessages {
        /// What is allowed for a request with as much body.
        limit: usize,
    },
    /// A message has more dynamic metadata than is read.
    #[error("the EPP sent more than {limit} bytes of dynamic metadata in one message")]
    MetadataTooLarge {
        /// The limit of the pool's EPP on the metadata of one message.
        limit: usize,
    },
    /// A kind of ext_proc reply that the agent does not have, or a message without any.
    #[error("the EPP sent a reply of an unknown kind")]
    UnknownReply,
    /// The head or the body of its own response for the client is too large.
    #[error("the EPP's immediate reply exceeds the limits")]
    ReplyTooLarge,
    /// The EPP decided no other request meanwhile, or no replica was known.
    #[error("the EPP did not decide in time")]
    Deadline,
    /// As `Deadline`, from an EPP that works: it holds the request back.
    #[error("the EPP decided other requests but not this one in time")]
    Held,
    /// With `response_to_picker = "body"`, after the pick: the response cannot be completed without the EPP.
    #[error("the EPP failed before it had answered for the response's body")]
    ResponseUnanswered,
    /// The EPP was not asked, because every replica has stalled: a request timed out and no replica has decided one since.
    #[error("the EPP is stalled and gets only probes until it decides a request")]
    Stalled,
}

impl PickError {
    /// Why no connection was made.
    pub fn not_connected(error: Arc<std::io::Error>) -> Self {
        if local_fault(&error).is_some() { Self::LocalFault(error) } else { Self::Connect(error) }
    }

    /// A stable label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            PickError::Unresolved(_) => "unresolved",
            PickError::NoReplica(_) => "no_replica",
            PickError::Connect(_) => "connect",
            PickError::LocalFault(_) => "local_fault",
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
            PickError::UnknownReply => "unknown_reply",
            PickError::ReplyTooLarge => "reply_too_large",
            PickError::Deadline => "deadline",
            PickError::Held => "held",
            PickError::ResponseUnanswered => "response_unanswered",
            PickError::Stalled => "stalled",
        }
    }

    /// Whether and where to ask again about the request. No variant is a decision, so a request never gets two.
    pub fn retry(&self) -> AskAgain {
        match self {
            PickError::NotTaken(_) => AskAgain::SameReplica,
            PickError::Reset { answered: false, .. } => AskAgain::SameReplicaOnce,
            // The same loss, noticed while connecting.
            PickError::Connect(error) if is_loss(error.kind()) => AskAgain::SameReplicaOnce,
            PickError::Connect(_)
            | PickError::LocalFault(_)
            | PickError::Reset { .. }
            | PickError::Status { code: tonic::Code::Unavailable, .. } => AskAgain::OtherReplica,
            _ => AskAgain::Never,
        }
    }

    /// Whether a server that can be reached says that it cannot serve now, as an EPP that drains or a proxy in front of one does.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, PickError::Status { code: tonic::Code::Unavailable, .. })
    }

    /// Whether no replica could be asked, or the connection to the one that was asked was lost.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            PickError::Unresolved(_)
                | PickError::NoReplica(_)
                | PickError::Connect(_)
                | PickError::LocalFault(_)
                | PickError::NotTaken(_)
                | PickError::Reset { .. }
        )
    }

    /// Whether no connection was made to the replica that was asked.
    pub fn is_unconnected(&self) -> bool {
        matches!(self, PickError::Connect(_) | PickError::LocalFault(_))
    }
}

/// Where to ask again about a request that got no decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskAgain {
    /// The same replica, which did not process the request. The next stream does not use a connection that is going away.
    SameReplica,
    /// The same replica over a new connection, which the next stream gets. Only once, because the request itself may have caused
    /// the loss.
    SameReplicaOnce,
    /// Another replica.
    OtherReplica,
    /// Nowhere: this is the EPP's answer, or the deadline has passed.
    Never,
}

/// The gRPC specification's names in lower case.
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
