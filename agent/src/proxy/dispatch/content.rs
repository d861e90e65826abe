//! The content of a request: the client's body and trailers, the same body under another model name, or the EPP's replacement. It
//! is shared, because the request may still be sent when the response arrives.

use std::{ops::Range, rc::Rc};

use bytes::Bytes;
use http::HeaderMap;

use crate::{http::body::BodyError, picker::exchange::Body, upload::CompleteBody};

/// Clones share the same content.
#[derive(Clone)]
pub(super) struct Content {
    client: Rc<CompleteBody>,
    change: Change,
}

/// What the endpoint gets in the place of the client's body. A changed body has no trailers.
#[derive(Clone)]
enum Change {
    None,
    Replaced(Rc<[Bytes]>),
    Renamed(Rc<Splice>),
}

/// A text in the place of a part of a body. Neither is empty.
pub(super) struct Splice {
    at: Range<u64>,
    text: Bytes,
}

impl Content {
    /// The client's body as the pick changed it. The change is moved out of `picked`.
    pub(super) fn new(client: CompleteBody, picked: &mut Body) -> Self {
        let change = match std::mem::replace(picked, Body::Original) {
            Body::Original | Body::DigestOnly(_) => Change::None,
            Body::Replaced(pieces) => Change::Replaced(pieces.into()),
            Body::Renamed(renamed) => Change::Renamed(Rc::new(Splice { at: renamed.at.clone(), text: renamed.text() })),
        };
        Self { client: Rc::new(client), change }
    }

    /// The client's body, so that the request can be picked and sent anew. Returns `None` if it is still in use.
    pub(super) fn give_back(self) -> Option<CompleteBody> {
        Rc::into_inner(self.client)
    }

    /// Bytes of the body. Returns `None` if the request has no body.
    pub(super) fn length(&self) -> Option<u64> {
        let kept = self.client.kept().len();
        match &self.change {
            Change::None => self.client.has_body().then_some(kept),
            Change::Replaced(pieces) => Some(pieces.iter().map(|piece| piece.len() as u64).sum()),
            Change::Renamed(splice) => Some(kept - (splice.at.end - splice.at.start) + splice.text.len() as u64),
        }
    }

    /// Returns `None` if there are no trailers.
    pub(super) fn trailers(&self) -> Option<&HeaderMap> {
        let trailers = matches!(self.change, Change::None).then(|| self.client.trailers())?;
        (!trailers.is_empty()).then_some(trailers)
    }

    /// Reads the body from its start.
    pub(super) fn pieces(&self) -> ContentPieces {
        let client = Rc::clone(&self.client);
        match &self.change {
            Change::None => ContentPieces::Client { client, splice: None, at: 0 },
            Change::Renamed(splice) => ContentPieces::Client { client, splice: Some(Rc::clone(splice)), at: 0 },
            Change::Replaced(pieces) => ContentPieces::Replaced(Rc::clone(pieces), 0),
        }
    }
}

pub(super) enum ContentPieces {
    Client {
        client: Rc<CompleteBody>,
        splice: Option<Rc<Splice>>,
        /// Offset of the next piece in the client's body. At the begin of the splice its text is next.
        at: u64,
    },
    /// The pieces and the index of the next one.
    Replaced(Rc<[Bytes]>, usize),
}

impl ContentPieces {
    /// Returns `None` at the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self {
            Self::Replaced(pieces, next) => {
                let piece = pieces.get(*next).cloned();
                *next += 1;
                Ok(piece)
            }
            Self::Client { splice: Some(splice), at, .. } if *at == splice.at.start => {
                *at = splice.at.end;
                Ok(Some(splice.text.clone()))
            }
            Self::Client { client, splice, at } => {
                let Some(mut piece) = client.kept().piece_at(*at).await? else { return Ok(None) };
                if let Some(splice) = splice
                    && *at < splice.at.start
                {
                    piece.truncate(usize::try_from(splice.at.start - *at).unwrap_or(usize::MAX));
                }
                *at += piece.len() as u64;
                Ok(Some(piece))
            }
        }
    }
}
