//! Queue of the pieces for the client, in order, and the end, while the EPP answers for a response's body.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
};

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::Notify;

use crate::deliver::{End, Sink};

/// The queue.
#[derive(Default)]
pub(super) struct OutQueue {
    pieces: RefCell<VecDeque<Bytes>>,
    /// Bytes in `pieces`.
    pub(super) bytes: Cell<usize>,
    /// Set at the end of the body.
    end: RefCell<Option<Result<HeaderMap, End>>>,
    /// Something was added, or taken.
    added: Notify,
    pub(super) taken: Notify,
}

/// Writes what the passage puts out, to its end.
pub(super) async fn write(to: &mut Sink<'_>, out: &OutQueue) -> Result<(), End> {
    to.begin().await?;
    loop {
        let next = out.pieces.borrow_mut().pop_front();
        if let Some(piece) = next {
            out.bytes.set(out.bytes.get() - piece.len());
            out.taken.notify_one();
            to.data(piece).await?;
            continue;
        }
        let end = out.end.borrow_mut().take();
        match end {
            Some(Ok(trailers)) => return to.end(trailers).await,
            Some(Err(end)) => return Err(end),
            None => {}
        }
        tokio::select! {
            biased;
            () = out.added.notified() => {}
            () = to.client.gone() => return Err(End::ClientGone),
        }
    }
}

impl OutQueue {
    pub(super) fn add(&self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes.set(self.bytes.get() + piece.len());
            self.pieces.borrow_mut().push_back(piece);
            self.added.notify_one();
        }
    }

    pub(super) fn end(&self, end: Result<HeaderMap, End>) {
        self.end.replace(Some(end));
        self.added.notify_one();
    }
}
