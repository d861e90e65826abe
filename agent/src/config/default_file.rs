//! Prints the default file: every setting with its documentation.

use serde_json::Value as Json;

use super::{
    Config,
    settings::{SettingKey, Settings as _, Shape},
};

/// Maximum width of a comment, in columns.
const WIDTH: usize = 130;

const INTRODUCTION: &str = "The settings of Penstock with their defaults. A line such as `#key = value` shows the form of a setting \
                            that has no default. Durations are \"250ms\", \"4s\", \"5m\" or \"1h\". Sizes are in bytes.";

/// Returns a complete commented file. Settings have their defaults; a setting without default is commented out, as `#key = value`.
pub fn default_toml() -> String {
    let mut text = String::new();
    comment(&mut text, INTRODUCTION);
    section(&mut text, "", &Config::describe());
    text
}

/// Prints the values of a section, and after them its sub-sections, as TOML requires.
fn section(text: &mut String, path: &str, keys: &[SettingKey]) {
    for key in keys {
        if let Shape::Value { choices, default, example, .. } = &key.shape {
            for paragraph in &key.doc {
                comment(text, paragraph);
            }
            for (name, meaning) in choices {
                comment(text, &format!("{name:?}: {meaning}"));
            }
            let Some(value) = example.as_ref().or(default.as_ref()) else { continue };
            let mark = if key.is_set { "" } else { "#" };
            text.push_str(&format!("{mark}{} = {}\n", key.name, toml(value)));
        }
    }
    for key in keys {
        let path = if path.is_empty() { key.name.to_owned() } else { format!("{path}.{}", key.name) };
        let (header, keys) = match &key.shape {
            Shape::Value { .. } => continue,
            Shape::Section(keys) => (format!("[{path}]"), keys),
            Shape::Sections(keys) => (format!("[[{path}]]"), keys),
        };
        text.push('\n');
        for paragraph in &key.doc {
            comment(text, paragraph);
        }
        let mark = if key.is_set { "" } else { "#" };
        text.push_str(&format!("{mark}{header}\n"));
        section(text, &path, keys);
    }
}

fn comment(text: &mut String, paragraph: &str) {
    let mut line = String::from("#");
    for word in paragraph.split(' ') {
        if line.len() + 1 + word.len() > WIDTH && line.len() > 1 {
            text.push_str(&line);
            text.push('\n');
            line.truncate(1);
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

/// Formats a value on one line.
pub(super) fn toml(value: &Json) -> String {
    match value {
        Json::Array(elements) => format!("[{}]", elements.iter().map(toml).collect::<Vec<_>>().join(", ")),
        Json::Object(entries) => {
            let entry = |(key, value): (&String, &Json)| format!("{} = {}", bare(key), toml(value));
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        // JSON's escapes are valid in TOML.
        simple => simple.to_string(),
    }
}

fn bare(key: &str) -> String {
    let is_bare = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if is_bare { key.to_owned() } else { Json::from(key).to_string() }
}
