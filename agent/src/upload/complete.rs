//! A request body that was received to its end.

use http::HeaderMap;

use crate::http::body::ReplayBody;

/// A complete request body and its trailers. Only [`Upload::complete`](super::Upload::complete) makes one, and dispatch takes
/// nothing else: no endpoint gets a part of a body, whichever way its request was picked.
pub struct CompleteBody {
    has_body: bool,
    kept: ReplayBody,
    trailers: HeaderMap,
}

impl CompleteBody {
    pub(super) fn new(has_body: bool, kept: ReplayBody, trailers: HeaderMap) -> Self {
        Self { has_body, kept, trailers }
    }

    /// Takes it apart: the body and the trailers.
    pub(super) fn into_parts(self) -> (ReplayBody, HeaderMap) {
        (self.kept, self.trailers)
    }

    /// Whether the request has a body, which may be empty.
    pub fn has_body(&self) -> bool {
        self.has_body
    }

    /// The body, empty if the request has none.
    pub fn kept(&self) -> &ReplayBody {
        &self.kept
    }

    pub fn trailers(&self) -> &HeaderMap {
        &self.trailers
    }

    pub fn trailers_mut(&mut self) -> &mut HeaderMap {
        &mut self.trailers
    }
}
