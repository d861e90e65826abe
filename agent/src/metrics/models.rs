//! Names of models as label values: they come from outside, so there are only so many.

use std::{collections::HashSet, sync::Arc};

use parking_lot::Mutex;

/// Different names for one pool; what comes later counts as [`OTHER`].
const MAX: usize = 100;
const OTHER: &str = "other";
/// A longer name is no name.
const MAX_LENGTH: usize = 128;

#[derive(Debug, Default)]
pub(super) struct Models(Mutex<HashSet<Arc<str>>>);

impl Models {
    pub(super) fn bounded(&self, model: &str) -> Arc<str> {
        let mut known = self.0.lock();
        if let Some(known) = known.get(model) {
            return Arc::clone(known);
        }
        let name: Arc<str> = if known.len() < MAX && model.len() <= MAX_LENGTH { model.into() } else { OTHER.into() };
        if known.len() < MAX {
            known.insert(Arc::clone(&name));
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_only_so_many() {
        let models = Models::default();
        assert_eq!(&*models.bounded(&"x".repeat(200)), OTHER);
        let names: Vec<_> = (0..2 * MAX).map(|n| models.bounded(&n.to_string())).collect();
        assert_eq!(names.iter().filter(|name| ***name != *OTHER).count(), MAX - 1);
        assert_eq!((&*models.bounded("5"), &*models.bounded("new")), ("5", OTHER));
        assert_eq!(models.0.lock().len(), MAX);
    }
}
