//! The objects of the API server and how they came about.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Which objects a request is about.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    /// Such as `/api/v1/namespaces/n/pods`, or `/api/v1/pods` for those of all namespaces.
    pub(super) path: String,
    pub(super) labels: Vec<(String, String)>,
    pub(super) name: Option<String>,
}

impl Selection {
    /// Whether objects of the collection with this path are selected.
    fn covers(&self, path: &str) -> bool {
        let (prefix, plural) = self.path.rsplit_once('/').unwrap_or_default();
        let of_any = path.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("/namespaces/"));
        path == self.path || of_any.and_then(|rest| rest.split_once('/')).is_some_and(|(_, last)| last == plural)
    }

    fn holds(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        self.labels.iter().all(|(key, value)| metadata["labels"][key] == **value)
            && self.name.as_ref().is_none_or(|name| metadata["name"] == **name)
    }
}

struct Change {
    version: u64,
    path: String,
    before: Option<Value>,
    after: Option<Value>,
}

#[derive(Default)]
pub(super) struct Cluster {
    version: u64,
    /// No watch begins before this version.
    compacted: u64,
    /// By path of the collection and name.
    objects: BTreeMap<(String, String), Value>,
    changes: Vec<Change>,
}

/// The path of the collection that an object belongs to.
fn path_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let api = text(&object["apiVersion"]);
    let prefix = if api.contains('/') { "apis" } else { "api" };
    let plural = format!("{}s", text(&object["kind"]).to_lowercase());
    if object["metadata"]["namespace"].is_null() {
        return format!("/{prefix}/{api}/{plural}");
    }
    format!("/{prefix}/{api}/namespaces/{}/{plural}", text(&object["metadata"]["namespace"]))
}

impl Cluster {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn apply(&mut self, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let path = path_of(&object);
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        let before = self.objects.insert((path.clone(), name), object.clone());
        self.changes.push(Change { version: self.version, path, before, after: Some(object) });
    }

    pub(super) fn delete(&mut self, plural: &str, namespace: &str, name: &str) {
        let end = match namespace {
            "" => format!("/{plural}"),
            namespace => format!("/namespaces/{namespace}/{plural}"),
        };
        let key = self.objects.keys().find(|(path, known)| path.ends_with(&end) && known == name).cloned();
        let key = key.unwrap_or_else(|| panic!("there is no {name} in {end}"));
        let mut before = self.objects.remove(&key).expect("an object");
        self.version += 1;
        before["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.changes.push(Change { version: self.version, path: key.0, before: Some(before), after: None });
    }

    pub(super) fn compact(&mut self) {
        // A version of its own, so that even the latest version that a client has is gone.
        self.version += 1;
        self.compacted = self.version;
    }

    /// Whether a watch can begin after `version`.
    pub(super) fn remembers(&self, version: u64) -> bool {
        version >= self.compacted
    }

    /// The objects of a selection.
    pub(super) fn list(&self, selection: &Selection) -> Vec<Value> {
        let of_path = self.objects.iter().filter(|((path, _), _)| selection.covers(path));
        of_path.map(|(_, object)| object.clone()).filter(|object| selection.holds(object)).collect()
    }

    /// The events after `version`, and the version up to which they go.
    pub(super) fn events(&self, selection: &Selection, version: u64) -> (Vec<Value>, u64) {
        let later = self.changes.iter().filter(|change| change.version > version && selection.covers(&change.path));
        let event = |change: &Change| {
            let holds = |object: &Option<Value>| object.as_ref().filter(|object| selection.holds(object)).cloned();
            let (kind, object) = match (holds(&change.before), holds(&change.after)) {
                (None, Some(after)) => ("ADDED", after),
                (Some(_), Some(after)) => ("MODIFIED", after),
                (Some(mut before), None) => {
                    before["metadata"]["resourceVersion"] = change.version.to_string().into();
                    ("DELETED", before)
                }
                (None, None) => return None,
            };
            Some(json!({ "type": kind, "object": object }))
        };
        (later.filter_map(event).collect(), self.version)
    }
}
