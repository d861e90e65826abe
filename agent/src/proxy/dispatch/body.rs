//! The body that a request is sent with: the client's as it was kept, or what the picker put in its place.

use bytes::Bytes;

use crate::{
    http::body::{BodyError, Pieces as Kept},
    picker::exchange::Body,
    upload::Upload,
};

/// Bytes of it; `None`: the request has no body.
pub(super) fn length(upload: &Upload, body: &Body) -> Option<u64> {
    match body {
        Body::Original if upload.has_body() => Some(upload.kept.len()),
        Body::Original => None,
        Body::Replaced(pieces) => Some(pieces.iter().map(|piece| piece.len() as u64).sum()),
    }
}

/// One reading of it.
pub(super) enum Pieces<'a> {
    Kept(Kept<'a>),
    Replaced(std::slice::Iter<'a, Bytes>),
}

impl<'a> Pieces<'a> {
    pub(super) fn new(upload: &'a Upload, body: &'a Body) -> Self {
        match body {
            Body::Original => Self::Kept(upload.kept.pieces()),
            Body::Replaced(pieces) => Self::Replaced(pieces.iter()),
        }
    }

    /// `None` at the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Kept(kept) => kept.next().await,
            Self::Replaced(pieces) => Ok(pieces.next().cloned()),
        }
    }
}
