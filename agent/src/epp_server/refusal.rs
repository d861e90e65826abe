//! Why a request gets no endpoint, and what its client is told: one match for status, code and reason.

use crate::{bbr::JsonError, picker::builtin::NoEndpoint};

#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("the body is not JSON: {0}")]
    Json(#[from] JsonError),
    #[error("the body has no model")]
    NoModel,
    #[error("model is not a string but {0}")]
    ModelIsNotAString(String),
    #[error("the body is longer than {0} bytes")]
    TooLong(usize),
    #[error("the bodies of all requests are more than this picker holds")]
    Full,
    #[error("{0}")]
    NoEndpoint(#[from] NoEndpoint),
}

impl Refusal {
    /// HTTP status, its name in the body, and the reason that is given in a header where the picker turned the request away.
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
