//! The content of a request: the client's kept body, the same under another model name, or the EPP's replacement, and the trailers. It is shared, because the request
//! may still be sent when the response arrives.

use std::{ops::Range, rc::Rc};

use bytes::Bytes;
use http::HeaderMap;

use crate::{
    http::body::{BodyError, Pieces as Kept, ReplayBody},
    picker::exchange::Body,
    upload::Upload,
};

/// Clones share the same content.
#[derive(Clone)]
pub(super) struct Content {
    body: ContentBody,
    trailers: Rc<HeaderMap>,
}

#[derive(Clone)]
enum ContentBody {
    None,
    Kept(Rc<ReplayBody>),
    Replaced(Rc<[Bytes]>),
    Renamed(Rc<ReplayBody>, Rc<Splice>),
}

/// A text in the place of a part of a body. Neither is empty.
pub(super) struct Splice {
    at: Range<u64>,
    text: Bytes,
}

impl Content {
    /// Moves the content out of the upload, which has to be complete, and the pick.
    pub(super) fn new(upload: &mut Upload, body: &mut Body) -> Self {
        let body = match std::mem::replace(body, Body::Original) {
            Body::Original if upload.has_body() => ContentBody::Kept(Rc::new(upload.take_kept())),
            Body::Original | Body::DigestOnly(_) => ContentBody::None,
            // The client's trailers are dropped with the client's body.
            Body::Replaced(pieces) => {
                return Self { body: ContentBody::Replaced(pieces.into()), trailers: Rc::default() };
            }
            Body::Renamed(renamed) => {
                let splice = Splice { at: renamed.at.clone(), text: renamed.text() };
                let body = ContentBody::Renamed(Rc::new(upload.take_kept()), Rc::new(splice));
                return Self { body, trailers: Rc::default() };
            }
        };
        Self { body, trailers: Rc::new(upload.take_trailers()) }
    }

    /// Moves the content back into the upload, so that the request can be picked and sent anew. Returns false if the body is still
    /// in use.
    pub(super) fn give_back(self, upload: &mut Upload) -> bool {
        let (kept, has_trailers) = match self.body {
            // The client's body has stayed in the upload, and so have its trailers.
            ContentBody::Replaced(_) => return true,
            ContentBody::None => (None, true),
            ContentBody::Kept(kept) => (Some(kept), true),
            ContentBody::Renamed(kept, _) => (Some(kept), false),
        };
        match kept.map(Rc::try_unwrap) {
            Some(Ok(kept)) => upload.kept = kept,
            Some(Err(_)) => return false,
            None => {}
        }
        if has_trailers {
            *upload.trailers_mut() = Rc::unwrap_or_clone(self.trailers);
        }
        true
    }

    /// Bytes of the body. Returns `None` if the request has no body.
    pub(super) fn length(&self) -> Option<u64> {
        match &self.body {
            ContentBody::None => None,
            ContentBody::Kept(kept) => Some(kept.len()),
            ContentBody::Replaced(pieces) => Some(pieces.iter().map(|piece| piece.len() as u64).sum()),
            ContentBody::Renamed(kept, splice) => {
                Some(kept.len() - (splice.at.end - splice.at.start) + splice.text.len() as u64)
            }
        }
    }

    pub(super) fn trailers(&self) -> &HeaderMap {
        &self.trailers
    }

    /// Reads the body from its start.
    pub(super) fn pieces(&self) -> Pieces {
        match &self.body {
            ContentBody::None => Pieces::Replaced(Rc::default(), 0),
            ContentBody::Kept(kept) => Pieces::Kept(Kept::of(Rc::clone(kept))),
            ContentBody::Replaced(pieces) => Pieces::Replaced(Rc::clone(pieces), 0),
            ContentBody::Renamed(kept, splice) => {
                Pieces::Renamed { kept: Rc::clone(kept), splice: Rc::clone(splice), at: 0 }
            }
        }
    }
}

pub(super) enum Pieces {
    Kept(Kept<Rc<ReplayBody>>),
    /// The pieces and the index of the next one.
    Replaced(Rc<[Bytes]>, usize),
    Renamed {
        kept: Rc<ReplayBody>,
        splice: Rc<Splice>,
        /// Offset of the next piece in the client's body. At the begin of the splice its text is next.
        at: u64,
    },
}

impl Pieces {
    /// Returns `None` at the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Kept(kept) => kept.next().await,
            Self::Replaced(pieces, next) => {
                let piece = pieces.get(*next).cloned();
                *next += 1;
                Ok(piece)
            }
            Self::Renamed { splice, at, .. } if *at == splice.at.start => {
                *at = splice.at.end;
                Ok(Some(splice.text.clone()))
            }
            Self::Renamed { kept, splice, at } => {
                let Some(mut piece) = kept.piece_at(*at).await? else { return Ok(None) };
                if *at < splice.at.start {
                    piece.truncate(usize::try_from(splice.at.start - *at).unwrap_or(usize::MAX));
                }
                *at += piece.len() as u64;
                Ok(Some(piece))
            }
        }
    }
}
