//! What was last known about the pools and the Gateway, in a file, so that an agent can start while the API server is away.
//!
//! The file is replaced as a whole by a rename. One that cannot be read, is too large or has another version is ignored, and the log
//! says why.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    config::{GatewayRef, InferencePoolRef, InferencePools},
    gateway::{GatewayObjects, KnownGateway},
    inference_pools::{InferencePool, Known},
};

const NAME: &str = "inference-pools.json";
const VERSION: u32 = 1;
/// Largest file in bytes.
const MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("{path}: {error}", path = .0.display(), error = .1)]
    Io(PathBuf, io::Error),
    #[error("{path}: larger than {MAX} bytes", path = .0.display())]
    TooLarge(PathBuf),
    #[error("{path}: {error}", path = .0.display(), error = .1)]
    Malformed(PathBuf, serde_json::Error),
    #[error("{path}: found version {found}, expected {VERSION}", path = .0.display(), found = .1)]
    Version(PathBuf, u32),
}

#[derive(Serialize, Deserialize)]
struct SavedPools {
    version: u32,
    #[serde(default)]
    pools: Vec<SavedPool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gateway: Option<SavedGateway>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    selected: Vec<(InferencePools, Vec<InferencePoolRef>)>,
}

#[derive(Serialize, Deserialize)]
struct SavedGateway {
    namespace: String,
    name: String,
    objects: GatewayObjects,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct SavedPool {
    #[serde(flatten)]
    named: InferencePoolRef,
    pool: InferencePool,
}

/// Reads the file in `folder`. Without a file nothing is known. Of the Gateway something is known if it is this one.
pub(super) fn load(folder: &Path, gateway: Option<&GatewayRef>) -> Result<Known, StateError> {
    let path = folder.join(NAME);
    let io = |error| StateError::Io(path.clone(), error);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::default()),
        Err(error) => return Err(io(error)),
    };
    let mut text = Vec::new();
    file.take(MAX + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > MAX {
        return Err(StateError::TooLarge(path));
    }
    let malformed = |error| StateError::Malformed(path.clone(), error);
    let Versioned { version } = serde_json::from_slice(&text).map_err(malformed)?;
    if version != VERSION {
        return Err(StateError::Version(path, version));
    }
    let SavedPools { pools, gateway: saved, selected, .. } = serde_json::from_slice(&text).map_err(malformed)?;
    let pools = pools.into_iter().map(|SavedPool { named, pool }| (named, pool)).collect();
    let known = |named: &GatewayRef| {
        let is_named = |saved: &SavedGateway| (&saved.namespace, &saved.name) == (&named.namespace, &named.name);
        saved.filter(is_named).map(|saved| Arc::new(KnownGateway::new(named, saved.objects)))
    };
    Ok(Known { pools, gateway: gateway.and_then(known), selected: selected.into_iter().collect() })
}

/// Replaces the file in `folder`.
pub(super) fn save(folder: &Path, gateway: Option<&GatewayRef>, known: &Known) -> Result<(), StateError> {
    let path = folder.join(NAME);
    let entry =
        |(named, pool): (&InferencePoolRef, &InferencePool)| SavedPool { named: named.clone(), pool: pool.clone() };
    let saved = |(named, known): (&GatewayRef, &KnownGateway)| {
        let (namespace, name) = (named.namespace.clone(), named.name.clone());
        SavedGateway { namespace, name, objects: known.objects.clone() }
    };
    let gateway = gateway.zip(known.gateway.as_deref()).map(saved);
    let pools = known.pools.iter().map(entry).collect();
    let selected = known.selected.iter().map(|(section, pools)| (section.clone(), pools.clone())).collect();
    let document = SavedPools { version: VERSION, pools, gateway, selected };
    let text = serde_json::to_vec(&document).map_err(|error| StateError::Malformed(path.clone(), error))?;
    if text.len() as u64 > MAX {
        return Err(StateError::TooLarge(path));
    }
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&text)?;
        file.as_file().sync_all()?;
        file.persist(&path).map_err(|error| error.error)?;
        fs::File::open(folder)?.sync_all()
    };
    write().map_err(|error| StateError::Io(path.clone(), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gateway::ApiObject,
        inference_pools::{EppService, PodPort, Usable},
    };

    fn gateway() -> GatewayRef {
        GatewayRef { namespace: "infra".into(), name: "g".into(), port: None }
    }

    fn known() -> Known {
        let named = |name: &str| InferencePoolRef { namespace: "n".into(), name: name.into(), ..Default::default() };
        let address = "[fd00::1]:8000".parse().unwrap();
        let endpoints = vec![PodPort { address, node: Some("n1".into()), zone: None, draining: true }];
        let epp = Some(EppService { address: "epp.n.svc:9002".into(), replicas: vec![address] });
        let usable = InferencePool::Usable(Usable { endpoints, epp, fails_open: true, is_h2c: false });
        let (absent, invalid) = (InferencePool::Absent, InferencePool::Invalid("no port".into()));
        let pools = [(named("a"), usable), (named("b"), absent), (named("c"), invalid)].into();
        let listener = serde_json::json!({ "name": "http", "port": 80, "protocol": "HTTP" });
        let object = ApiObject { spec: serde_json::json!({ "listeners": [listener] }), ..ApiObject::default() };
        let objects =
            GatewayObjects { gateway: Some(object.clone()), routes: vec![object], ..GatewayObjects::default() };
        let section = InferencePools { labels: Some("a in (b, c)".into()), ..InferencePools::default() };
        let selected = [(section, vec![named("a"), named("b")])].into();
        Known { pools, gateway: Some(Arc::new(KnownGateway::new(&gateway(), objects))), selected }
    }

    #[test]
    fn saved_state_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let own = gateway();
        assert_eq!(load(folder.path(), None).unwrap(), Known::default(), "no file has been written");
        save(folder.path(), None, &Known::default()).unwrap();
        save(folder.path(), Some(&own), &known()).unwrap();
        assert_eq!(load(folder.path(), Some(&own)).unwrap(), known());
        let other = GatewayRef { name: "other".into(), ..own };
        for gateway in [None, Some(&other)] {
            assert_eq!(load(folder.path(), gateway).unwrap(), Known { gateway: None, ..known() });
        }
        let files: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(files, [NAME], "no other file remains");
    }

    #[test]
    fn unusable_file_is_an_error_that_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(NAME);
        for (text, expected) in [
            (r#"{"version":2,"pools":"other"}"#, "found version 2, expected 1"),
            (r#"{"version":1,"pools":[{"namesp"#, "EOF while parsing"),
            (r#"{"version":1,"pools":[{"namespace":"n"}]}"#, "missing field"),
            ("", "EOF while parsing"),
        ] {
            fs::write(&path, text).unwrap();
            let error = load(folder.path(), None).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(NAME), "{text}: {error}");
        }
        File::create(&path).unwrap().set_len(MAX + 1).unwrap();
        assert!(matches!(load(folder.path(), None), Err(StateError::TooLarge(_))));
        let missing = folder.path().join("missing");
        assert!(matches!(save(&missing, None, &known()), Err(StateError::Io(..))));
    }
}
