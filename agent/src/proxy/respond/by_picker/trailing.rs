//! The trailers of a response: what the EPP changes in them, and whether it replies to them at all.

use penstock_proto::ext_proc::HeaderMutation;

use super::{Passage, PassageStop};
use crate::{http::trailers, picker::mutation};

impl Passage<'_> {
    /// Whether the reply to the trailers is all that is missing.
    pub(super) fn owes_trailers_alone(&self) -> bool {
        self.shown && self.stream.is_some() && self.returned.is_whole()
    }

    /// Remembers whether the EPP replies to trailers, if it was sent them.
    pub(super) fn note_trailers(&self, answered: bool) {
        if let Some(stream) = self.stream.as_ref().filter(|_| self.shown) {
            stream.note_trailers(answered);
        }
    }

    /// Applies what the EPP changes in the trailers, and ends the response. `None` if that exceeds the limits.
    pub(super) fn change_trailers(&mut self, change: Option<&HeaderMutation>) -> Result<(), PassageStop> {
        for piece in self.returned.end().map_err(|why| self.unusable(why))? {
            self.put(&piece);
        }
        let mut changed = self.trailers.clone().unwrap_or_default();
        let invalid = change.map(|change| mutation::apply(change, &mut changed));
        if invalid.is_some() && trailers::check(&changed, false).is_ok() {
            self.trailers = Some(changed);
        } else {
            self.metrics.epp_failed("mutation_too_large");
            tracing::warn!("EPP's mutation of trailers exceeds the limits, not applied");
        }
        self.end();
        Ok(())
    }
}
