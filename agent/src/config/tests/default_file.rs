//! Checks that the default file has every setting, and that its values are the defaults.

use std::time::Duration;

use http::uri::PathAndQuery;

use super::{
    super::settings::{SettingKey, Settings as _, Shape},
    *,
};

#[test]
fn default_file_gives_defaults() {
    let pool = Pool::new("default", [address("127.0.0.1:8000")]);
    assert_eq!(Config::parse(&default_toml(), "p.toml").unwrap(), Config::new(vec![pool]));
}

/// The default file with its commented settings enabled: `#key = …` and `#[[section]]`, but not `# prose`.
fn everything_on() -> String {
    let text = default_toml();
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
        _ => format!("{line}\n"),
    });
    let text = lines.collect::<String>().replace("kind = \"builtin\"", "kind = \"epp\"");
    text.replace("\"closed\"", "\"open\"").replace("missing_model = \"pass\"", "missing_model = \"default\"")
}

#[test]
fn commented_settings_of_default_file_give_defaults() {
    let mut text = everything_on();
    let excluded = [
        "ca_file",
        "pins",
        "server_name",
        "unreachable_wait",
        "client_ca_file",
        "client_certificates",
        "client_cert_file",
        "client_key_file",
        "health_port",
        "health_tls",
        "counters",
        "prefer",
        "pools",
    ];
    for key in excluded {
        text = text.replace(&format!("\n{key} = "), "\n#");
    }
    let text = text.replace("path = \"/v1/chat", "#");
    // TLS to endpoints needs its protocol, and a file unless it is insecure.
    let text = text.replace("app_protocol = \"http1\"", "app_protocol = \"https\"");
    let text = text.replace("verify = \"ca\"", "verify = \"insecure\"");
    // Excludes what the pool says about its endpoints and its picker.
    let without = |text: &str, section: &str| {
        let (before, section) = text.split_once(section).unwrap();
        format!("{before}{}", section.split_once("\n[").map(|(_, rest)| format!("[{rest}")).unwrap())
    };
    let text = without(&without(&text, "[pools.inference_pool]"), "[pools.inference_pools]");
    // Excludes what forwards a request.
    let (text, section) = text.split_once("[routes.redirect]").unwrap();
    assert!(!section.contains("\n["), "redirect is the last section");
    let config = Config::parse(text, "p.toml").unwrap();
    assert_eq!(config.pools[0].picker, Picker::Epp(Epp::new("127.0.0.1:9002")));
    assert_eq!(config.pools[0].default_upstream, Some("127.0.0.1:8001".parse().unwrap()));
    assert_eq!(config.pools[0].health, Some(HealthCheck::new(PathAndQuery::from_static("/health"))));
    assert_eq!(config.pools[0].endpoints_file, Some("endpoints.toml".into()));
    let tls = ListenTls {
        address: address("0.0.0.0:8443"),
        cert_file: "tls.crt".into(),
        key_file: "tls.key".into(),
        ..ListenTls::default()
    };
    let allow_origins = vec![OriginPattern::Exact("https://app.example.com".to_owned())];
    let cors = Some(Cors { allow_origins, ..Cors::default() });
    assert_eq!(config.listen, Listen { tls: Some(tls), cors, ..Listen::default() });
    assert_eq!(config.node, Node { name: Some("node-1".into()), zone: Some("zone-a".into()) });
    assert_eq!(config.pools[0].session_headers, ["x-session-id"]);
    assert_eq!(config.bbr.missing_model, MissingModel::Default("unknown".into()));
    assert_eq!(config.bbr.base_models, [("sql-lora".to_owned(), "llama-3.1-8b".to_owned())].into());
    assert_eq!(config.routes, [whole_route()]);
    assert_eq!(config.pools[0].timeouts, times(60, 600, 300));
}

/// The route of the default file with everything on.
fn whole_route() -> Route {
    let header = |name: &'static str, value: Option<&str>| HeaderCondition {
        name: http::HeaderName::from_static(name),
        value: value.map(str::to_owned),
    };
    let field = |name: &'static str, value: &'static str| SetField {
        name: http::HeaderName::from_static(name),
        value: http::HeaderValue::from_static(value),
    };
    Route {
        hosts: vec![HostPattern::Exact("llm.example.com".into())],
        path: Some(PathPattern::Prefix("/v1".into())),
        methods: vec![http::Method::POST],
        headers: vec![header("x-team", Some("red")), header("x-beta", None)],
        models: vec![ModelPattern::Exact("llama-3.1-8b".into())],
        base_models: vec!["llama-3.1-8b".into()],
        pools: vec![WeightedPool::new("default", 1)],
        timeouts: times(60, 600, 300),
        query: vec![QueryCondition { name: "beta".into(), value: Some("1".into()) }],
        request_headers: FieldChanges {
            set: vec![field("x-team", "red")],
            add: vec![field("x-seen", "1")],
            remove: Vec::new(),
        },
        rewrite: Some(Rewrite { host: Some("llm.internal".into()), path: Some(PathChange::Prefix("/v1".into())) }),
        ..Route::default()
    }
}

/// Arguments are in seconds; `request` is off.
fn times(body: u64, first_byte: u64, idle: u64) -> TimeoutOverrides {
    let [body, first_byte, idle] = [body, first_byte, idle].map(|seconds| Some(Some(Duration::from_secs(seconds))));
    TimeoutOverrides { body, first_byte, idle, request: Some(None), dispatch: Some(None) }
}

/// Every key is in its section, with a comment and a value.
#[test]
fn default_file_has_every_key() {
    fn check(text: &str, path: &str, keys: &[SettingKey]) {
        let start = text.find(&format!("\n{path}\n")).unwrap_or_else(|| panic!("{path} is missing"));
        let section = &text[start + path.len() + 2..];
        let section = &section[..section.find("\n[").unwrap_or(section.len())];
        for key in keys {
            let below = format!("{}.{}", path.trim_matches(['[', ']']), key.name);
            assert!(!key.doc.is_empty(), "{below} has no documentation");
            match &key.shape {
                Shape::Value { .. } => {
                    assert!(section.lines().any(|line| line.starts_with(&format!("{} = ", key.name))), "{below}");
                }
                Shape::Section(keys) => check(text, &format!("[{below}]"), keys),
                Shape::Sections(keys) => check(text, &format!("[[{below}]]"), keys),
            }
        }
    }
    let text = everything_on();
    for key in Config::describe() {
        match &key.shape {
            Shape::Sections(keys) => check(&text, &format!("[[{}]]", key.name), keys),
            Shape::Section(keys) => check(&text, &format!("[{}]", key.name), keys),
            Shape::Value { .. } => panic!("{} is in no section", key.name),
        }
    }
}

#[test]
fn unknown_top_level_key_is_rejected() {
    assert_eq!(
        messages(&format!("top = 1\n{POOL}")),
        [
            "p.toml:1:1: top: found an unknown key, expected one of listen, admin, limits, timeouts, headers, errors, bbr, models, steering, tracing, process, node, dns, kubernetes, pools, routes"
        ]
    );
}
