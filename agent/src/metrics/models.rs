//! Model names as label values. They come from outside, so their number is bounded over all pools and for the life of
//! the agent.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;

/// The label value for names beyond the limit.
const OTHER: &str = "other";
/// Maximum length of a name, in bytes; longer names count as `other`.
const MAX_LENGTH: usize = 128;

#[derive(Debug)]
pub(super) struct Models {
    known: Mutex<HashSet<Arc<str>>>,
    limit: AtomicUsize,
    other: Arc<str>,
    overflow: Counter,
}

impl Models {
    /// `overflow` counts names seen after `limit` names are known.
    pub(super) fn new(limit: usize, overflow: Counter) -> Self {
        Self { known: Mutex::default(), limit: limit.into(), other: OTHER.into(), overflow }
    }

    /// Sets the limit. Known names stay.
    pub(super) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    /// The label value for a model; empty for a response without one.
    pub(super) fn bounded(&self, model: &str) -> Arc<str> {
        let mut known = self.known.lock();
        if let Some(known) = known.get(model) {
            return Arc::clone(known);
        }
        if !model.is_empty() && (known.len() >= self.limit.load(Relaxed) || model.len() > MAX_LENGTH) {
            self.overflow.inc();
            return Arc::clone(&self.other);
        }
        let name: Arc<str> = model.into();
        if !model.is_empty() {
            known.insert(Arc::clone(&name));
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_names_beyond_the_limit_become_other() {
        let overflow = Counter::default();
        let models = Models::new(100, overflow.clone());
        assert_eq!(&*models.bounded(&"x".repeat(200)), OTHER);
        assert_eq!((&*models.bounded(""), overflow.get()), ("", 1));
        let names: Vec<_> = (0..200).map(|n| models.bounded(&n.to_string())).collect();
        assert_eq!(names.iter().filter(|name| ***name != *OTHER).count(), 100);
        assert_eq!((&*models.bounded("5"), &*models.bounded("new"), &*models.bounded("")), ("5", OTHER, ""));
        assert_eq!((models.known.lock().len(), overflow.get()), (100, 102));
        models.set_limit(101);
        assert_eq!((&*models.bounded("new"), &*models.bounded("newer")), ("new", OTHER));
        models.set_limit(0);
        assert_eq!((&*models.bounded("5"), &*models.bounded("newest")), ("5", OTHER));
    }
}
