//! Invalid sections, and settings that can be off.

use super::*;

#[test]
fn off_disables_what_can_be_off() {
    let text = "[timeouts]\nhead = \"off\"\nbody = \"off\"\nkeep_alive = \"off\"\nconnect = \"off\"\nfirst_byte = \"off\"\nidle = \"off\"\nrequest = \"off\"\nendpoint_unreachable = \"off\"\n[headers]\nvia = \"off\"\nx_forwarded = \"off\"\n";
    let config = Config::parse(&format!("{text}{POOL}"), "p.toml").unwrap();
    let (head, body, keep_alive, connect) = (None, None, None, None);
    let (first_byte, idle, request) = (None, None, None);
    let timeouts = Timeouts {
        head,
        body,
        keep_alive,
        connect,
        first_byte,
        idle,
        request,
        endpoint_unreachable: None,
        ..Timeouts::default()
    };
    assert_eq!(config.timeouts, timeouts);
    assert_eq!(config.headers, Headers { via: None, x_forwarded: Forwarding::Off, ..Headers::default() });
}

#[test]
fn wrong_values_in_sections_are_rejected() {
    const DURATION: &str = r#"a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#;
    let cases = [
        ("[listen]\naddress = \"localhost:8080\"", r#"p.toml:2:11: listen.address: found "localhost:8080", expected ip:port, such as "0.0.0.0:8080" or "[::]:8080""#.to_owned()),
        ("[listen]\n\nworkers = -1", "p.toml:3:11: listen.workers: found -1, expected an integer from 0 to 1024".to_owned()),
        ("[listen.tls]\naddress = \"0.0.0.0:1\"\ncert_file = \"none.crt\"", r"p.toml:1:1: listen.tls.key_file: found nothing, expected the file with its key".to_owned()),
        ("[listen]\nport = 1", "p.toml:2:1: listen.port: found an unknown key, expected one of address, workers, max_connections, http2_max_streams, upgrades, tls, cors, http2_resets, http2_control_frames, half_close, proxy_protocol, max_connection_age, tls_handshakes".to_owned()),
        ("[listen.cors]\nallow_origins = [\"*\"]\nallow_credentials = true", r#"p.toml:3:1: listen.cors.allow_credentials: found true with allow_origins = ["*"], expected the origins that may use credentials"#.to_owned()),
        ("[listen.cors]\nmax_age = \"1h\"", r#"p.toml:1:1: listen.cors.allow_origins: found none, expected at least one origin, or ["*"]"#.to_owned()),
        ("listen = 5", "p.toml:1:1: listen: found 5, expected a section".to_owned()),
        ("[admin]\naddress = \"127.0.0.1:8080\"", "p.toml:2:1: admin.address: found 127.0.0.1:8080, expected another port than listen.address (0.0.0.0:8080)".to_owned()),
        ("[limits]\nhead_bytes = 100", "p.toml:2:14: limits.head_bytes: found 100, expected an integer from 1024 to 1048576".to_owned()),
        ("[limits]\nhead_fields = 1.5", "p.toml:2:15: limits.head_fields: found 1.5, expected an integer from 16 to 1024".to_owned()),
        ("[limits]\nmetric_models = -1", "p.toml:2:17: limits.metric_models: found -1, expected an integer from 0 to 10000".to_owned()),
        ("[limits]\nbody_bytes = 10\nbody_memory_bytes = 11", "p.toml:3:1: limits.body_memory_bytes: found 11, expected at most limits.body_bytes (10)".to_owned()),
        ("[timeouts]\ndrain = 10", format!("p.toml:2:9: timeouts.drain: found 10, expected {DURATION}")),
        ("[timeouts]\ndrain = \"0s\"", format!("p.toml:2:9: timeouts.drain: found \"0s\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"1.5s\"", format!("p.toml:2:9: timeouts.drain: found \"1.5s\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"off\"", format!("p.toml:2:9: timeouts.drain: found \"off\", expected {DURATION}")),
        ("[timeouts]\nendpoint_keep_alive = \"off\"", format!("p.toml:2:23: timeouts.endpoint_keep_alive: found \"off\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"99999999999999999999h\"", format!("p.toml:2:9: timeouts.drain: found \"99999999999999999999h\", expected {DURATION}")),
        ("[timeouts]\nidle = false", format!("p.toml:2:8: timeouts.idle: found false, expected \"off\" or {DURATION}")),
        ("[timeouts]\nrequest = \"never\"", format!("p.toml:2:11: timeouts.request: found \"never\", expected \"off\" or {DURATION}")),
        ("[timeouts]\nendpoint_unreachable = \"999ms\"", "p.toml:2:24: timeouts.endpoint_unreachable: found \"999ms\", expected \"off\" or a duration such as \"4s\", \"5m\" or \"1h\", from 1s to 24h".to_owned()),
        ("[headers]\nvia = \"a b\"", r#"p.toml:2:7: headers.via: found "a b", expected "off" or a name without spaces, such as "penstock""#.to_owned()),
        ("[headers]\nvia = \"\"", r#"p.toml:2:7: headers.via: found "", expected "off" or a name without spaces, such as "penstock""#.to_owned()),
        ("[headers]\nx_forwarded = \"on\"", r#"p.toml:2:15: headers.x_forwarded: found "on", expected "append" or "replace" or "off""#.to_owned()),
        ("[headers]\nforwarded = true", r#"p.toml:2:13: headers.forwarded: found true, expected "append" or "replace" or "off""#.to_owned()),
        ("[errors]\nformat = \"html\"", r#"p.toml:2:10: errors.format: found "html", expected "openai" or "plain""#.to_owned()),
        ("[tracing]\notlp_endpoint = \"127.0.0.1:4317\"", r#"p.toml:2:17: tracing.otlp_endpoint: found "127.0.0.1:4317", expected "off" or a URL such as "http://127.0.0.1:4317""#.to_owned()),
        ("[tracing]\notlp_endpoint = \"https://a:4317\"", r#"p.toml:2:17: tracing.otlp_endpoint: found "https://a:4317", expected "off" or a URL such as "http://127.0.0.1:4317""#.to_owned()),
        ("[tracing]\nsampling_ratio = 1.5", "p.toml:2:18: tracing.sampling_ratio: found 1.5, expected a number from 0 to 1".to_owned()),
        ("[tracing]\nsampling_ratio = nan", "p.toml:2:18: tracing.sampling_ratio: found nan, expected a number from 0 to 1".to_owned()),
        ("[tracing]\nqueue_spans = 0", "p.toml:2:15: tracing.queue_spans: found 0, expected an integer from 1 to 1048576".to_owned()),
        ("[bbr]\nenabled = \"yes\"", r#"p.toml:2:11: bbr.enabled: found "yes", expected true or false"#.to_owned()),
        ("[bbr]\nmodel_header = \"Content-Length\"", r#"p.toml:2:16: bbr.model_header: found "Content-Length", expected the name of a header that does not frame the message"#.to_owned()),
        ("[bbr]\ndefault_model = \"\"", r#"p.toml:2:17: bbr.default_model: found "", expected a string that is not empty"#.to_owned()),
        ("[bbr]\nmissing_model = \"fail\"", r#"p.toml:2:17: bbr.missing_model: found "fail", expected "pass" or "default" or "reject""#.to_owned()),
        ("[bbr]\nmissing_model = \"default\"", r#"p.toml:2:1: bbr.missing_model: found "default" without a default_model, expected default_model in the same section"#.to_owned()),
        ("[bbr]\nmissing_model = \"pass\"\ndefault_model = \"m\"", r#"p.toml:3:1: bbr.default_model: found a setting without effect, expected missing_model = "default""#.to_owned()),
        ("[bbr]\nbase_model_header = \"x-gateway-model-name\"", "p.toml:2:1: bbr.base_model_header: found x-gateway-model-name, expected another header than bbr.model_header (x-gateway-model-name)".to_owned()),
        ("[bbr]\nbase_models = [\"a\"]", r#"p.toml:2:1: bbr.base_models: found an array, expected a table of adapters and base models, such as { "sql-lora" = "llama-3.1-8b" }"#.to_owned()),
        ("[bbr.base_models]\na = \"\"", r#"p.toml:2:5: bbr.base_models.a: found "", expected a string that is not empty"#.to_owned()),
        ("[bbr.base_models]\na = \"b\"\nb = \"c\"", r#"p.toml:1:6: bbr.base_models: found "b" for "a", which is itself an adapter, expected base models that have no other base model"#.to_owned()),
        ("[steering]\nmode = \"on\"", r#"p.toml:2:8: steering.mode: found "on", expected "auto" or "local" or "ingress" or "off" or "wire""#.to_owned()),
        ("[steering]\ninterfaces = \"eth0,\"", r#"p.toml:2:14: steering.interfaces: found "eth0,", expected "auto" or names of interfaces, separated by commas"#.to_owned()),
        ("[steering]\nmin_bytes = 10\nmax_remote_bytes = 9", "p.toml:3:1: steering.max_remote_bytes: found 9, expected 0, or at least steering.min_bytes (10)".to_owned()),
        ("[steering]\nclient_send_buffer = 1", "p.toml:2:22: steering.client_send_buffer: found 1, expected an integer from 32768 to 67108864".to_owned()),
        ("[steering]\nendpoint_receive_buffer = 99999999999", "p.toml:2:27: steering.endpoint_receive_buffer: found 99999999999, expected an integer from 16384 to 67108864".to_owned()),
        ("[steering]\nforce = 1", "p.toml:2:9: steering.force: found 1, expected true or false".to_owned()),
        ("[steering]\nmax_flows = 0", "p.toml:2:13: steering.max_flows: found 0, expected an integer from 1 to 1048576".to_owned()),
    ];
    for (section, expected) in cases {
        assert_message(&format!("{section}\n{POOL}"), &expected);
    }
}

/// `default_model` is used without `missing_model`, and with `missing_model = "default"`.
#[test]
fn default_model_without_rule_is_used() {
    for text in ["default_model = \"m\"", "missing_model = \"default\"\ndefault_model = \"m\""] {
        let config = Config::parse(&format!("[bbr]\n{text}\n{POOL}"), "p.toml").unwrap();
        assert_eq!(config.bbr.missing_model, MissingModel::Default("m".into()));
    }
}
