//! `[pools.picker.metadata]`: what becomes of the dynamic metadata of an EPP's replies.

use std::fmt;

use serde_json::json;

use super::{
    document::Section,
    settings::settings,
    value::{Value, integer},
};

/// Maximum number of counters of a pool.
const COUNTERS: usize = 64;
/// Maximum length of a counter's name, in bytes.
const NAME: usize = 256;

settings! {
    /// What becomes of the dynamic metadata of the EPP's replies. It is written to the access log and the trace span under the names
    /// that the EPP gave, without the pick. A later reply about a request replaces earlier values of the same name.
    pub struct EppMetadata {
        /// Maximum size of one request's metadata in the access log and the span, names and values as JSON, in bytes. A value that
        /// does not fit is dropped. 0 drops all.
        pub log_bytes: usize = 4096 => integer(0..=256 << 10),
        /// Maximum number of values of one request in the access log and the span. Further ones are dropped.
        pub log_entries: usize = 64 => integer(0..=4096),
        /// Maximum depth of a value in the access log and the span: 1 for a number or text, 2 for a list of them. Deeper ones are
        /// dropped.
        pub log_depth: usize = 4 => integer(1..=32),
        /// Numbers that are added to `penstock_epp_attributes_total` by pool, model and attribute at the end of each request, such as
        /// its cost: `namespace/key`. Also counted if the access log has no room for them.
        pub counters: Vec<Attribute> = Vec::new()
            => attribute()
                .list("an array of namespace/key")
                .example(json!(["envoy.lb/x-gateway-inference-request-cost"])),
    }
}

/// The name of a value in dynamic metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// A namespace of the dynamic metadata, such as `envoy.lb`.
    pub namespace: String,
    /// A key of the namespace's top level. It may contain slashes.
    pub key: String,
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.key)
    }
}

/// The namespace ends at the first slash.
fn attribute() -> Value<Attribute> {
    let parse = |text: &str| {
        let (namespace, key) = text.split_once('/').filter(|_| text.len() <= NAME)?;
        let is_name = |name: &str| !name.is_empty() && !name.contains(char::is_control);
        (is_name(namespace) && is_name(key)).then(|| Attribute { namespace: namespace.into(), key: key.into() })
    };
    Value::text("namespace/key, such as \"envoy.lb/cost\"", parse, ToString::to_string)
}

impl EppMetadata {
    pub(super) fn check(&self, section: &Section<'_>) {
        for (index, attribute) in self.counters.iter().enumerate() {
            if self.counters[..index].contains(attribute) {
                let found = format_args!("\"{attribute}\" again");
                section.reject(&format!("counters[{index}]"), found, "each attribute once");
            }
        }
        if self.counters.len() > COUNTERS {
            section.reject(
                "counters",
                format_args!("{} attributes", self.counters.len()),
                format_args!("at most {COUNTERS}"),
            );
        }
    }
}
