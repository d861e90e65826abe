//! Prints the reference of all settings, which is a part of docs/configuration.md.

use super::{
    Config,
    default_file::toml,
    settings::{SettingKey, Settings as _, Shape},
};

/// Returns Markdown: one table for each section.
pub fn reference() -> String {
    let mut text = String::new();
    for key in &Config::describe() {
        section(&mut text, key, key.name);
    }
    text
}

fn section(text: &mut String, key: &SettingKey, path: &str) {
    let (header, keys) = match &key.shape {
        Shape::Value { .. } => return,
        Shape::Section(keys) => (format!("[{path}]"), keys),
        Shape::Sections(keys) => (format!("[[{path}]]"), keys),
    };
    text.push_str(&format!("### `{header}`\n\n"));
    for paragraph in &key.doc {
        text.push_str(&format!("{paragraph}\n\n"));
    }
    text.push_str("| setting | default | values | meaning |\n|---|---|---|---|\n");
    for key in keys {
        if let Shape::Value { words, choices, default, .. } = &key.shape {
            let default = match default {
                Some(default) => format!("`{}`", toml(default)),
                None if key.required => "required".to_owned(),
                None => "none".to_owned(),
            };
            let mut meaning = key.doc.clone();
            meaning
                .extend(key.old_name.map(|old_name| format!("The old name `{old_name}` is accepted with a warning.")));
            meaning.extend(choices.iter().map(|(name, meaning)| format!("`{name:?}`: {meaning}")));
            let cells = [format!("`{}`", key.name), default, words.clone(), meaning.join("<br>")];
            text.push_str(&format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | ")));
        }
    }
    text.push('\n');
    for key in keys {
        section(text, key, &format!("{path}.{}", key.name));
    }
}
