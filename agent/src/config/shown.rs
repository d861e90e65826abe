//! The configuration that is in force, for `GET /config`: every value, without what may be secret.

use serde_json::Value as Json;

use super::{
    Config, picker,
    settings::{KeyValues, Settings as _},
};

/// Shown instead of what may be secret.
pub(super) const HIDDEN: &str = "(hidden)";

/// Words in the names of keys whose values may be secret. `value` is that of a header field or of a parameter of the query.
const SECRET: [&str; 17] = [
    "auth",
    "authorization",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "key",
    "keys",
    "passphrase",
    "passwd",
    "password",
    "private",
    "secret",
    "secrets",
    "token",
    "tokens",
    "value",
];

impl Config {
    /// The values of all settings, as the file would have them, without what may be secret.
    pub fn shown(&self) -> Json {
        let mut shown = Json::Object(self.all_values());
        hide(&mut shown);
        shown
    }

    pub(super) fn all_values(&self) -> KeyValues {
        let mut values = self.values();
        let pools = values.get_mut("pools").and_then(Json::as_array_mut).into_iter().flatten();
        for (pool, shown) in self.pools.iter().zip(pools) {
            if let Some(picker) = shown.get_mut("picker").and_then(Json::as_object_mut) {
                picker::put_session_headers(&pool.session_headers, picker);
            }
        }
        values
    }
}

/// Replaces what may be secret: the values of keys with such a [name](may_be_secret), and credentials in URLs.
pub(super) fn hide(value: &mut Json) {
    match value {
        Json::Object(entries) => {
            for (name, value) in entries {
                // A flag tells nothing.
                if may_be_secret(name) && !value.is_boolean() {
                    *value = HIDDEN.into();
                } else {
                    hide(value);
                }
            }
        }
        Json::Array(elements) => elements.iter_mut().for_each(hide),
        Json::String(text) => *text = without_credentials(text),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

/// Whether the value of a key with this name may be secret. The path of a file is not.
pub(super) fn may_be_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    !name.ends_with("_file") && name.split(['_', '-', '.']).any(|word| SECRET.contains(&word))
}

/// Without user and password of a URL, and without the query of a URL or of a request target.
fn without_credentials(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None if text.starts_with('/') => (String::new(), text),
        None => return text.to_owned(),
    };
    let is_url = !scheme.is_empty();
    let (user, rest) = match rest.rsplit_once('@').filter(|_| is_url) {
        Some((_, rest)) => (format!("{HIDDEN}@"), rest),
        None => (String::new(), rest),
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, _)) => (rest, format!("?{HIDDEN}")),
        None => (rest, String::new()),
    };
    format!("{scheme}{user}{rest}{query}")
}
