//! The objects of one query as they are known now, shared between the watch that fills it and the pool that reads it.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::objects::Object;

/// Most objects of one query. A pool has fewer Pods; more means that a selector is wrong.
pub(super) const MAX_OBJECTS: usize = 10_000;

/// Whether an object is kept.
pub(super) type KeepFilter<K> = Box<dyn Fn(&K) -> bool + Send + Sync>;

pub(super) struct Store<K> {
    /// By key. None until the first list was complete.
    objects: Mutex<Option<BTreeMap<String, K>>>,
    /// Notified when the objects change.
    changed: Arc<Notify>,
    /// None keeps all.
    keep: Option<KeepFilter<K>>,
}

impl<K: Object + PartialEq> Store<K> {
    pub(super) fn new(changed: Arc<Notify>, keep: Option<KeepFilter<K>>) -> Self {
        Self { objects: Mutex::default(), changed, keep }
    }

    pub(super) fn keeps(&self, object: &K) -> bool {
        self.keep.as_ref().is_none_or(|keep| keep(object))
    }

    /// Replaces all objects by those of a complete list. Returns how many there are, and how many were left out.
    pub(super) fn replace(&self, listed: Vec<K>) -> (usize, usize) {
        let left_out = listed.len().saturating_sub(MAX_OBJECTS);
        let listed = listed.into_iter().take(MAX_OBJECTS);
        let listed: BTreeMap<_, _> = listed.map(|object| (object.key(), object)).collect();
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
        let key = object.key();
        if !self.keeps(&object) {
            return (self.remove(&key), false);
        }
        let mut objects = self.objects.lock();
        let known = objects.get_or_insert_default();
        let is_full = known.len() >= MAX_OBJECTS && !known.contains_key(&key);
        if !is_full && known.get(&key) != Some(&object) {
            known.insert(key, object);
            self.changed.notify_one();
        }
        (known.len(), is_full)
    }

    /// Removes an object. Returns how many are left.
    pub(super) fn remove(&self, key: &str) -> usize {
        let mut objects = self.objects.lock();
        let known = objects.get_or_insert_default();
        if known.remove(key).is_some() {
            self.changed.notify_one();
        }
        known.len()
    }

    /// Whether there was a complete list.
    pub(super) fn is_known(&self) -> bool {
        self.objects.lock().is_some()
    }

    /// All objects by key, or None before the first complete list.
    pub(super) fn all(&self) -> Option<Vec<K>> {
        self.objects.lock().as_ref().map(|objects| objects.values().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::objects::Service, *};

    fn service(number: usize) -> Service {
        Service { name: format!("s{number}"), version: String::new(), is_external: false, ports: Vec::new() }
    }

    fn store() -> Store<Service> {
        Store::new(Arc::default(), None)
    }

    #[test]
    fn objects_are_unknown_until_a_list_is_complete() {
        let store = store();
        assert_eq!((store.all(), store.is_known()), (None, false));
        assert_eq!(store.replace(Vec::new()), (0, 0));
        assert_eq!((store.all(), store.is_known()), (Some(Vec::new()), true));
        assert_eq!(store.apply(service(1)), (1, false));
        assert_eq!((store.remove("s2"), store.remove("s1")), (1, 0));
    }

    #[test]
    fn objects_beyond_the_limit_are_left_out() {
        let store = store();
        assert_eq!(store.replace((0..MAX_OBJECTS + 2).map(service).collect()), (MAX_OBJECTS, 2));
        assert_eq!(store.apply(service(MAX_OBJECTS + 3)), (MAX_OBJECTS, true));
        assert_eq!(store.apply(service(0)), (MAX_OBJECTS, false), "a known object is replaced");
        assert_eq!(store.remove("s0"), MAX_OBJECTS - 1);
        assert_eq!(store.apply(service(MAX_OBJECTS + 3)), (MAX_OBJECTS, false));
    }

    #[tokio::test]
    async fn only_changes_are_told() {
        let changed = Arc::new(Notify::new());
        let store = Store::new(Arc::clone(&changed), None);
        let is_told = async || tokio::time::timeout(std::time::Duration::ZERO, changed.notified()).await.is_ok();
        store.replace(vec![service(1)]);
        assert!(is_told().await);
        store.replace(vec![service(1)]);
        store.apply(service(1));
        store.remove("s2");
        assert!(!is_told().await);
        store.remove("s1");
        assert!(is_told().await);
    }
}
