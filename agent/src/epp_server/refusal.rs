//! Why a request gets no endpoint, with the status, the code and the reason that its client gets.

use crate::{bbr::JsonError, picker::builtin::NoEndpoint};

#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the body is not JSON: {0}")]
    Json(#[from] JsonError),
    #[error("the body has no model")]
    NoModel,
    #[error("found model {0}, expected a string")]
    ModelIsNotAString(String),
    #[error("the body is longer than {0} bytes")]
    TooLong(usize),
    #[error("the memory for request bodies is used up")]
    Full,
    #[error("{0}")]
    NoEndpoint(#[from] NoEndpoint),
}

impl Refusal {
    /// The label in the log.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Refusal::Json(_) => "json",
            Refusal::NoModel | Refusal::ModelIsNotAString(_) => "model",
            Refusal::TooLong(_) => "body_too_large",
            Refusal::Full => "held_bytes",
            Refusal::NoEndpoint(NoEndpoint::NoneEligible) => "no_endpoint",
            Refusal::NoEndpoint(NoEndpoint::Saturated) => "saturated",
        }
    }

    /// The HTTP status, its name in the body, and the reason for the header `x-llm-d-request-dropped-reason`, if it is set.
    pub(super) fn terms(&self) -> (i32, &'static str, Option<&'static str>) {
        match self {
            Refusal::Json(_) | Refusal::NoModel | Refusal::ModelIsNotAString(_) => (400, "BadRequest", None),
            Refusal::Full => (503, "ServiceUnavailable", Some("rejected-full")),
            Refusal::TooLong(_) => (413, "PayloadTooLarge", None),
            Refusal::NoEndpoint(NoEndpoint::NoneEligible) => (503, "ServiceUnavailable", Some("rejected-no-endpoints")),
            Refusal::NoEndpoint(NoEndpoint::Saturated) => (429, "ResourceExhausted", Some("rejected-saturated")),
        }
    }
}
