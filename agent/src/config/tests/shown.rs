//! The configuration that is in force: every setting is shown, and no secret.

use std::collections::BTreeSet;

use http::HeaderValue;
use serde_json::{Value as Json, json};

use super::{
    super::{
        default_file::toml,
        document,
        settings::{SettingKey, Settings as _, Shape},
        shown::{HIDDEN, hide, may_be_secret},
    },
    *,
};

/// A word that no output may have.
const SECRET: &str = "hunter2";

/// Reads what is shown, secrets included, without the checks that concern several settings.
pub(super) fn assert_reads_back(config: &Config) {
    let line = |(key, value): (&String, &Json)| format!("{key} = {}\n", toml(value));
    let text: String = config.all_values().iter().map(line).collect();
    let read = document::read(&text, "p.toml", &Config::describe(), Config::read);
    let (read, _) = read.unwrap_or_else(|errors| panic!("{errors}\n{text}"));
    assert_eq!(&read, config, "{text}");
}

#[test]
fn default_configuration_is_shown_whole() {
    let config = Config::new(vec![pool()]);
    assert_reads_back(&config);
    let shown = config.shown();
    assert_eq!(shown["listen"]["address"], "0.0.0.0:8080");
    assert_eq!(shown["pools"][0]["endpoints"], json!(["127.0.0.1:8000"]));
    assert!(!shown.to_string().contains(HIDDEN), "{shown}");
}

/// A value that this schema describes, or looks like it, in which each text is `text`.
fn filled(schema: &Json, text: &str) -> Json {
    let alternatives = ["anyOf", "oneOf"].iter().find_map(|key| schema[key].as_array());
    if let Some(alternatives) = alternatives {
        return alternatives.iter().map(|schema| filled(schema, text)).collect();
    }
    let entries = |schemas: &Json| match schemas.as_object() {
        Some(schemas) => schemas.iter().map(|(key, schema)| (key.clone(), filled(schema, text))).collect(),
        None => Json::from(serde_json::Map::new()),
    };
    match schema["type"].as_str() {
        Some("string") => text.into(),
        Some("array") => json!([filled(&schema["items"], text)]),
        Some("object") if schema["additionalProperties"].is_object() => {
            json!({ "any": filled(&schema["additionalProperties"], text) })
        }
        Some("object") => entries(&schema["properties"]),
        _ => Json::Null,
    }
}

/// Every setting, in which each text is `text`.
fn all(keys: &[SettingKey], text: &str) -> Json {
    let entries = keys.iter().map(|key| {
        let value = match &key.shape {
            Shape::Value { schema, .. } => filled(schema, text),
            Shape::Section(keys) => all(keys, text),
            Shape::Sections(keys) => json!([all(keys, text)]),
        };
        (key.name.to_owned(), value)
    });
    Json::Object(entries.collect())
}

#[test]
fn credentials_in_urls_of_every_setting_are_hidden() {
    for text in [
        format!("https://user:{SECRET}@host.example/path"),
        format!("https://{SECRET}@host.example:1/a@b"),
        format!("https://user:{SECRET}/x?@host.example"),
        format!("https://host.example/path?token={SECRET}"),
        format!("/path?token={SECRET}"),
    ] {
        let mut value = all(&Config::describe(), &text);
        let count = |value: &Json, text: &str| value.to_string().matches(text).count();
        assert!(count(&value, SECRET) > 80, "{value}");
        hide(&mut value);
        assert_eq!(count(&value, SECRET), 0, "{text}: {value}");
    }
}

/// Settings with free text that is not secret. Add a new one here, or give it a name that says it is secret.
const PLAIN: &[&str] = &[
    "address",
    "age",
    "allow_headers",
    "allow_methods",
    "allow_origins",
    "any",
    "base",
    "base_model",
    "base_model_header",
    "body",
    "bpffs",
    "ca_file",
    "cert_file",
    "cgroup",
    "client_ca_file",
    "client_cert_file",
    "client_certificate",
    "client_key_file",
    "client_unreachable",
    "coalesce",
    "connect",
    "connect_timeout",
    "counters",
    "decision_timeout",
    "default_model",
    "default_upstream",
    "destination_header",
    "dispatch",
    "drain",
    "endpoint_keep_alive",
    "endpoint_unreachable",
    "endpoints",
    "endpoints_dns",
    "endpoints_file",
    "export_interval",
    "expose_headers",
    "first_byte",
    "head",
    "health_interval",
    "health_service",
    "host",
    "idle",
    "interfaces",
    "interval",
    "keep_alive",
    "key_file",
    "kubeconfig",
    "labels",
    "lame_duck",
    "linger",
    "max",
    "max_age",
    "max_connection_age",
    "max_ttl",
    "method",
    "methods",
    "min_ttl",
    "model",
    "model_header",
    "name",
    "namespace",
    "node",
    "otlp_endpoint",
    "passthrough",
    "path",
    "path_prefix",
    "pins",
    "pool",
    "remove",
    "request",
    "response_timeout",
    "server_name",
    "servers",
    "service_name",
    "session_header",
    "sse_keepalive",
    "start_wait",
    "state_dir",
    "time",
    "timeout",
    "unreachable_wait",
    "upgrade_drain",
    "upgrade_socket",
    "upgrades",
    "user",
    "via",
    "watch_timeout",
    "zone",
];

/// The names of settings whose value may be any text, or almost any.
fn free_texts(name: &str, value: &Json, names: &mut BTreeSet<String>) {
    match value {
        Json::String(_) => {
            names.insert(name.to_owned());
        }
        Json::Array(elements) => elements.iter().for_each(|element| free_texts(name, element, names)),
        Json::Object(entries) => entries.iter().for_each(|(name, value)| free_texts(name, value, names)),
        _ => {}
    }
}

#[test]
fn every_setting_with_free_text_is_hidden_or_known_to_be_no_secret() {
    let mut names = BTreeSet::new();
    free_texts("", &all(&Config::describe(), "x"), &mut names);
    let (secret, plain): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| may_be_secret(name));
    assert_eq!(secret, ["value"]);
    assert_eq!(plain, PLAIN);
    for name in ["api_key", "token", "password", "client_secret", "otlp_authorization", "Cookie"] {
        assert!(may_be_secret(name), "{name}");
    }
    for name in ["key_file", "client_key_file", "keep_alive", "session_header"] {
        assert!(!may_be_secret(name), "{name}");
    }
}

#[test]
fn secrets_that_a_configuration_can_hold_are_hidden() {
    let text = format!(
        "{POOL}[[routes]]\npool = \"a\"\nheaders = [{{ name = \"authorization\", value = \"Bearer {SECRET}\" }}]\n\
         query = [{{ name = \"api_key\", value = \"{SECRET}\" }}]\n\
         [routes.request_headers]\nset = [{{ name = \"authorization\", value = \"Bearer {SECRET}\" }}]\n\
         add = [{{ name = \"x-key\", value = \"{SECRET}\" }}]\n"
    );
    let mut config = Config::parse(&text, "p.toml").unwrap();
    // The parser refuses it, and what is shown does not rely on that.
    config.tracing.otlp_endpoint = Some(format!("http://user:{SECRET}@127.0.0.1:4317"));
    config.routes[0].request_headers.set[0].value = HeaderValue::from_str(&format!("Bearer {SECRET}")).unwrap();
    let shown = config.shown();
    assert!(!shown.to_string().contains(SECRET), "{shown}");
    let route = &shown["routes"][0];
    assert_eq!(route["headers"], json!([{ "name": "authorization", "value": HIDDEN }]));
    assert_eq!(route["query"], json!([{ "name": "api_key", "value": HIDDEN }]));
    assert_eq!(route["request_headers"]["add"], json!([{ "name": "x-key", "value": HIDDEN }]));
    assert_eq!(shown["tracing"]["otlp_endpoint"], format!("http://{HIDDEN}@127.0.0.1:4317"));
}
