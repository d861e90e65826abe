//! The objects of one query as they are known now, shared between the watch that fills it and the pool that reads it.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::objects::Object;

/// Most objects of one query. A pool has fewer Pods; more means that a selector is wrong.
pub(super) const MAX_OBJECTS: usize = 10_000;

#[derive(Debug)]
pub(super) struct Store<K> {
    /// By name. None until the first list was complete.
    objects: Mutex<Option<BTreeMap<String, K>>>,
    /// Notified when the objects change.
    changed: Arc<Notify>,
}

impl<K: Object + PartialEq> Store<K> {
    pub(super) fn new(changed: Arc<Notify>) -> Self {
        Self { objects: Mutex::default(), changed }
    }

    /// Replaces all objects by those of a complete list. Returns how many there are, and how many were left out.
    pub(super) fn replace(&self, listed: Vec<K>) -> (usize, usize) {
        let left_out = listed.len().saturating_sub(MAX_OBJECTS);
        let listed = listed.into_iter().take(MAX_OBJECTS);
        let listed: BTreeMap<_, _> = listed.map(|object| (object.name().to_owned(), object)).collect();
        let count = listed.len();
        let mut objects = self.objects.lock();
        if objects.as_ref() != Some(&listed) {
            *objects = Some(listed);
            self.changed.notify_one();
        }
        (count, left_out)
    }

    /// Adds or replaces an object. Returns how many there are, and whether this one was left out.
    pub(super) fn apply(&self, object: K) -> (usize, bool) {
        let mut objects = self.objects.lock();
        let known = objects.get_or_insert_default();
        let is_full = known.len() >= MAX_OBJECTS && !known.contains_key(object.name());
        if !is_full && known.get(object.name()) != Some(&object) {
            known.insert(object.name().to_owned(), object);
            self.changed.notify_one();
        }
        (known.len(), is_full)
    }

    /// Removes an object. Returns how many are left.
    pub(super) fn remove(&self, name: &str) -> usize {
        let mut objects = self.objects.lock();
        let known = objects.get_or_insert_default();
        if known.remove(name).is_some() {
            self.changed.notify_one();
        }
        known.len()
    }

    /// All objects by name, or None before the first complete list.
    pub(super) fn all(&self) -> Option<Vec<K>> {
        self.objects.lock().as_ref().map(|objects| objects.values().cloned().collect())
    }
}
