//! Kinds of paths. A relative path is resolved against the folder of the configuration file.

use std::path::PathBuf;

use serde_json::json;

use super::{
    document::Section,
    settings::{KeyValues, SettingKey, SettingKind},
    value::{Custom, Required, Value, string},
};

fn path() -> Value<String> {
    string("the path of a file", |text| !text.is_empty()).schema(json!({ "type": "string", "minLength": 1 }))
}

/// The path of a file. A relative path is resolved against the folder of the configuration file.
pub(super) fn file() -> Custom<Option<PathBuf>> {
    Custom {
        words: "the path of a file",
        schema: json!({ "type": "string", "minLength": 1 }),
        read: |section, key| Some(path().read(section, key).map(|file| section.folder().join(file))),
        show: |path| path.as_ref().map(|path| path.display().to_string().into()),
    }
}

/// The path of a folder. A relative path is resolved against the folder of the configuration file.
pub(super) fn folder() -> Custom<Option<PathBuf>> {
    Custom { words: "the path of a folder", ..file() }
}

/// As [`file()`]; absence is an error, and `words` name what is missing.
pub(super) fn required_file(words: &'static str, example: &'static str) -> RequiredFile {
    RequiredFile(path().required(words, example))
}

pub(super) struct RequiredFile(Required<String>);

impl SettingKind for RequiredFile {
    type Value = PathBuf;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<PathBuf> {
        self.0.read(section, key).map(|file| section.folder().join(file))
    }

    fn put(&self, name: &'static str, value: &PathBuf, keys: &mut KeyValues) {
        self.0.put(name, &value.display().to_string(), keys);
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &PathBuf) -> Vec<SettingKey> {
        self.0.describe(name, doc, &String::new())
    }
}
