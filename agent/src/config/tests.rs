//! Good files give what they say; bad files give exactly these messages.

mod routes;

use std::time::Duration;

use http::uri::PathAndQuery;

use super::*;

const POOL: &str = "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8000\"]\n";

fn pool() -> Pool {
    Pool::new("a", [address("127.0.0.1:8000")])
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn messages(text: &str) -> Vec<String> {
    let errors = Config::parse(text, "p.toml").expect_err(text);
    errors.iter().map(ToString::to_string).collect()
}

/// One error for one bad line, put in front of (a section) or behind (keys of the pool) a good pool.
#[track_caller]
fn assert_message(text: &str, expected: &str) {
    assert_eq!(messages(text), [expected], "{text}");
}

#[test]
fn a_pool_is_enough() {
    assert_eq!(Config::parse(POOL, "p.toml").unwrap(), Config::new(vec![pool()]));
}

#[test]
fn the_default_file_is_the_defaults() {
    let pool = Pool::new("default", [address("127.0.0.1:8000")]);
    assert_eq!(Config::parse(&default_toml(), "p.toml").unwrap(), Config::new(vec![pool]));
}

/// The default file with its commented settings switched on: `#key = …` and `#[[section]]`, but not `# prose`.
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
fn the_commented_settings_of_the_default_file_are_the_defaults() {
    let mut text = everything_on();
    for key in
        ["ca_file", "pins", "server_name", "client_cert_file", "client_key_file", "health_port", "health_tls", "prefer"]
    {
        text = text.replace(&format!("\n{key} = "), "\n#");
    }
    // Its files are not there.
    let (front, listen_tls) = text.split_once("[listen.tls]\n").unwrap();
    let text = format!("{front}{}", &listen_tls[listen_tls.find("\n[").unwrap()..]);
    let text = text.replace("path = \"/v1/chat", "#").replace("pool = ", "#");
    let config = Config::parse(&text, "p.toml").unwrap();
    assert_eq!(config.pools[0].picker, Picker::Epp(Epp::new("127.0.0.1:9002")));
    assert_eq!(config.pools[0].default_upstream, Some("127.0.0.1:8001".parse().unwrap()));
    assert_eq!(config.pools[0].health, Some(HealthCheck::new(PathAndQuery::from_static("/health"))));
    assert_eq!(config.pools[0].endpoints_file, Some("endpoints.toml".into()));
    assert_eq!(config.node, Node { name: Some("node-1".into()), zone: Some("zone-a".into()) });
    assert_eq!(config.pools[0].session_headers, ["x-session-id"]);
    assert_eq!(config.bbr.missing_model, MissingModel::Default("unknown".into()));
    assert_eq!(config.bbr.base_models, [("sql-lora".to_owned(), "llama-3.1-8b".to_owned())].into());
    let header = |name: &'static str, value: Option<&str>| HeaderCondition {
        name: http::HeaderName::from_static(name),
        value: value.map(str::to_owned),
    };
    let route = Route {
        hosts: vec![HostPattern::Exact("llm.example.com".into())],
        path: Some(PathPattern::Prefix("/v1".into())),
        methods: vec![http::Method::POST],
        headers: vec![header("x-team", Some("red")), header("x-beta", None)],
        models: vec![ModelPattern::Exact("llama-3.1-8b".into())],
        base_models: vec!["llama-3.1-8b".into()],
        pools: vec![WeightedPool::new("default", 70)],
        timeouts: times(60, 600, 300),
    };
    assert_eq!(config.routes, [route]);
    assert_eq!(config.pools[0].timeouts, times(60, 600, 300));
}

/// In seconds; the whole of a request is off.
fn times(body: u64, first_byte: u64, idle: u64) -> TimeoutOverrides {
    let [body, first_byte, idle] = [body, first_byte, idle].map(|seconds| Some(Some(Duration::from_secs(seconds))));
    TimeoutOverrides { body, first_byte, idle, request: Some(None) }
}

#[test]
fn the_default_file_has_every_key() {
    let text = everything_on();
    let mut sections = 0;
    for (at, header) in text.match_indices("\n[").map(|(at, _)| (at, text[at + 1..].lines().next().unwrap())) {
        // An unknown key makes the reader list those it knows.
        let body = at + 1 + header.len();
        let probed = format!("{}\nno_such_key = 1{}", &text[..body], &text[body..]);
        let messages = messages(&probed);
        let known = messages.iter().find_map(|message| message.split_once("found an unknown key, expected one of "));
        let (_, known) = known.unwrap_or_else(|| panic!("{header}: {messages:?}"));
        let section = &text[body..];
        let section = &section[..section.find("\n[").unwrap_or(section.len())];
        for key in
            known.split(", ").filter(|key| !["tls", "picker", "subset", "retry", "ejection", "health"].contains(key))
        {
            assert!(section.lines().any(|line| line.starts_with(&format!("{key} = "))), "{header} lacks {key}");
        }
        sections += 1;
    }
    assert_eq!(sections, 20);
    assert_eq!(
        messages(&format!("top = 1\n{text}"))[0],
        "p.toml:1: top: found an unknown key, expected one of listen, admin, limits, timeouts, headers, errors, bbr, steering, tracing, process, node, dns, pools, routes"
    );
}

#[test]
fn every_setting_is_read() {
    let text = r#"
        [listen]
        address = "[::1]:80"
        workers = 3
        max_connections = 1_000
        http2_max_streams = 0
        upgrades = []
        http2_resets = 2
        http2_control_frames = 100
        half_close = "answer"
        tls_handshakes = 4
        [admin]
        address = "127.0.0.1:0"
        [limits]
        head_bytes = 0x400
        headers = 16
        body_bytes = 5
        body_memory_bytes = 4
        total_body_bytes = 7
        total_spill_bytes = 0
        decoded_body_bytes = 8
        body_min_rate = 9
        metric_models = 3
        linger_bytes = 6
        [timeouts]
        head = "1ms"
        body = "2s"
        keep_alive = "3m"
        connect = "4h"
        first_byte = "off"
        idle = "off"
        request = "5m"
        endpoint_keep_alive = "5s"
        endpoint_unreachable = "1s"
        drain = "24h"
        lame_duck = "7s"
        linger = "6s"
        client_unreachable = "off"
        [headers]
        via = "gw.example:8080"
        x_forwarded = "replace"
        forwarded = "append"
        request_id_to_client = true
        [errors]
        format = "plain"
        [bbr]
        enabled = false
        header = "X-Model"
        missing_model = "default"
        default_model = "m"
        base_model_header = "X-Base"
        base_models = { "l 1" = "b", b = "b" }
        [steering]
        mode = "ingress"
        cgroup = "/cgroup"
        min_bytes = 1
        max_remote_bytes = 0
        client_send_buffer = 32768
        endpoint_receive_buffer = 67108864
        max_flows = 7
        force = true
        [tracing]
        otlp_endpoint = "http://[::1]:4317/"
        sampling_ratio = 0.25
        service_name = "edge"
        queue_spans = 8
        export_interval = "2s"
        [process]
        user = "1000:2000"
        groups = [3000, 4000]

        [node]
        name = "n1"
        zone = "a"
        [dns]
        servers = ["[::1]:53"]
        timeout = "1s"
        min_ttl = "2s"
        max_ttl = "3s"
        [[pools]]
        name = "team/gpu"
        endpoints = ["10.0.0.1", "10.0.0.2:80", { address = "10.0.0.3:80", node = "n1", zone = "a", draining = true }]
        endpoints_dns = "models.svc"
        endpoints_file = "/etc/endpoints.json"
        ports = [8000, 8001]
        subset = { prefer = ["zone", "node"], empty = "fail" }
        retry = { attempts = 0, methods = ["POST"], budget_percent = 5, budget_min_per_second = 6 }
        ejection = { failures = 0, base = "1s", max = "2s", max_percent = 100, server_errors = true }
        health = { path = "/live?full=1", interval = "1s", timeout = "2s", unhealthy_after = 4, healthy_after = 5 }
        app_protocol = "h2c"
        pick_per = "lease"
        pin = { age = "off" }
        lease = { time = "1s", requests = 2 }
        timeouts = { body = "1s", first_byte = "2s", idle = "3s", request = "off" }
        failure_mode = "open"
        default_upstream = "127.0.0.2:1"
        passthrough = ["10.0.0.0/8", "fd00::1"]
        [pools.picker]
        kind = "epp"
        address = ["epp.svc:9002", "[fd00::7]:9002"]
        tls = "pinned"
        pins = ["00000000000000000000000000000000000000000000000000000000000000fF"]
        server_name = "epp.example"
        connect_timeout = "2s"
        decision_timeout = "3s"
        response_timeout = "off"
        response_to_picker = "usage"
        response_queue_bytes = 65536
        header = "x-pick"
        health_interval = "1s"
        health_port = 9003
        health_tls = true
        health_service = "inference-extension"
        open_on_deadline = true
        limits = { fields = 16, bytes = 1024, messages = 17, metadata_bytes = 1025 }
        session_header = ["x-session-id", "x-other"]
        [[routes]]
        host = "*.Example.com."
        path = "/v1/models/"
        method = ["GET", "HEAD"]
        headers = [{ name = "X-A", value = "b c" }]
        pool = "team/gpu"
        [[routes]]
        path_prefix = "/v1/"
        [[routes.pools]]
        name = "team/gpu"
        [routes.timeouts]
        first_byte = "off"
        request = "1h"
    "#;
    let pool = Pool {
        name: "team/gpu".into(),
        endpoints: vec![
            address("10.0.0.1:8000").into(),
            address("10.0.0.1:8001").into(),
            address("10.0.0.2:80").into(),
            Endpoint {
                address: address("10.0.0.3:80"),
                node: Some("n1".into()),
                zone: Some("a".into()),
                draining: true,
            },
        ],
        endpoints_dns: Some(NamedEndpoints { name: "models.svc".into(), ports: vec![8000, 8001] }),
        endpoints_file: Some("/etc/endpoints.json".into()),
        ports: vec![8000, 8001],
        app_protocol: AppProtocol::H2c,
        pick_per: PickPer::Lease,
        pin: PinLimits { age: None },
        lease: LeaseLimits { time: Duration::from_secs(1), requests: 2 },
        failure_mode: FailureMode::Open,
        default_upstream: Some("127.0.0.2:1".parse().unwrap()),
        passthrough: Passthrough::Networks(["10.0.0.0/8", "fd00::1"].map(|text| Network::parse(text).unwrap()).into()),
        picker: Picker::Epp(Epp {
            addresses: vec!["epp.svc:9002".into(), "[fd00::7]:9002".into()],
            tls: EppTls::Pinned(vec![Pin(std::array::from_fn(|at| if at == 31 { 0xff } else { 0 }))]),
            server_name: Some("epp.example".into()),
            client_certificate: None,
            connect_timeout: Duration::from_secs(2),
            decision_timeout: Some(Duration::from_secs(3)),
            response_timeout: None,
            response_to_picker: ResponseToPicker::Usage,
            response_queue_bytes: 65_536,
            header: http::HeaderName::from_static("x-pick"),
            health_interval: Some(Duration::from_secs(1)),
            health_port: Some(9003),
            health_tls: true,
            health_service: "inference-extension".into(),
            open_on_deadline: true,
            limits: EppLimits { fields: 16, bytes: 1024, messages: 17, metadata_bytes: 1025 },
        }),
        session_headers: ["x-session-id", "x-other"].map(http::HeaderName::from_static).to_vec(),
        subset: Subset { prefer: vec![Locality::Zone, Locality::Node], endpoints: vec![], empty: EmptySubset::Fail },
        retry: Retry { attempts: 0, methods: vec![http::Method::POST], budget_percent: 5, budget_min_per_second: 6 },
        ejection: Ejection {
            failures: 0,
            base: Duration::from_secs(1),
            max: Duration::from_secs(2),
            max_percent: 100,
            server_errors: true,
        },
        health: Some(HealthCheck {
            path: PathAndQuery::from_static("/live?full=1"),
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
            unhealthy_after: 4,
            healthy_after: 5,
        }),
        timeouts: times(1, 2, 3),
    };
    let expected = Config {
        listen: Listen {
            address: "[::1]:80".parse().unwrap(),
            workers: 3,
            max_connections: 1000,
            http2_max_streams: 0,
            upgrades: vec![],
            tls: None,
            http2_resets: 2,
            http2_control_frames: 100,
            half_close: HalfClose::Answer,
            tls_handshakes: 4,
        },
        admin: Admin { address: "127.0.0.1:0".parse().unwrap() },
        limits: Limits {
            head_bytes: 1024,
            headers: 16,
            body_bytes: 5,
            body_memory_bytes: 4,
            total_body_bytes: 7,
            total_spill_bytes: 0,
            decoded_body_bytes: 8,
            body_min_rate: 9,
            metric_models: 3,
            linger_bytes: 6,
        },
        timeouts: Timeouts {
            head: Some(Duration::from_millis(1)),
            body: Some(Duration::from_secs(2)),
            keep_alive: Some(Duration::from_secs(180)),
            connect: Some(Duration::from_secs(4 * 3600)),
            first_byte: None,
            idle: None,
            request: Some(Duration::from_secs(300)),
            endpoint_keep_alive: Duration::from_secs(5),
            endpoint_unreachable: Some(Duration::from_secs(1)),
            drain: Duration::from_secs(24 * 3600),
            lame_duck: Some(Duration::from_secs(7)),
            linger: Duration::from_secs(6),
            client_unreachable: None,
        },
        headers: Headers {
            via: Some("gw.example:8080".into()),
            x_forwarded: Forwarding::Replace,
            forwarded: Forwarding::Append,
            request_id_to_client: true,
        },
        errors: Errors { format: ErrorFormat::Plain },
        bbr: Bbr {
            enabled: false,
            header: http::HeaderName::from_static("x-model"),
            missing_model: MissingModel::Default("m".into()),
            base_model_header: http::HeaderName::from_static("x-base"),
            base_models: ["l 1", "b"].map(|model| (model.to_owned(), "b".to_owned())).into(),
        },
        steering: Steering {
            mode: SteeringMode::Ingress,
            cgroup: Some("/cgroup".into()),
            min_bytes: 1,
            max_remote_bytes: 0,
            client_send_buffer: 32_768,
            endpoint_receive_buffer: 67_108_864,
            max_flows: 7,
            force: true,
        },
        tracing: Tracing {
            otlp_endpoint: Some("http://[::1]:4317/".into()),
            sampling_ratio: Ratio::new(0.25).unwrap(),
            service_name: "edge".into(),
            queue_spans: 8,
            export_interval: Duration::from_secs(2),
        },
        process: Process { user: Some(User { uid: 1000, gid: 2000 }), groups: vec![3000, 4000] },
        node: Node { name: Some("n1".into()), zone: Some("a".into()) },
        dns: Dns {
            servers: vec![address("[::1]:53")],
            timeout: Duration::from_secs(1),
            min_ttl: Duration::from_secs(2),
            max_ttl: Duration::from_secs(3),
        },
        pools: vec![pool],
        routes: vec![
            Route {
                hosts: vec![HostPattern::Below(".example.com".into())],
                path: Some(PathPattern::Exact("/v1/models/".into())),
                methods: vec![http::Method::GET, http::Method::HEAD],
                headers: vec![HeaderCondition {
                    name: http::HeaderName::from_static("x-a"),
                    value: Some("b c".into()),
                }],
                ..Route::to("team/gpu")
            },
            Route {
                path: Some(PathPattern::Prefix("/v1".into())),
                timeouts: TimeoutOverrides {
                    first_byte: Some(None),
                    request: Some(Some(Duration::from_secs(3600))),
                    ..TimeoutOverrides::default()
                },
                ..Route::to("team/gpu")
            },
        ],
    };
    assert_eq!(Config::parse(text, "p.toml").unwrap(), expected);
}

#[test]
fn what_can_be_off() {
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
fn bad_sections() {
    const DURATION: &str = r#"a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#;
    let cases = [
        ("[listen]\naddress = \"localhost:8080\"", r#"p.toml:2: listen.address: found "localhost:8080", expected ip:port, such as "0.0.0.0:8080" or "[::]:8080""#.to_owned()),
        ("[listen]\n\nworkers = -1", "p.toml:3: listen.workers: found -1, expected an integer from 0 to 1024".to_owned()),
        ("[listen.tls]\naddress = \"0.0.0.0:1\"\ncert_file = \"none.crt\"", r"p.toml:1: listen.tls.key_file: found nothing, expected the file with its key".to_owned()),
        ("[listen]\nport = 1", "p.toml:2: listen.port: found an unknown key, expected one of address, workers, max_connections, http2_max_streams, upgrades, tls, http2_resets, http2_control_frames, half_close, tls_handshakes".to_owned()),
        ("listen = 5", "p.toml:1: listen: found 5, expected a section".to_owned()),
        ("[admin]\naddress = \"127.0.0.1:8080\"", "p.toml:2: admin.address: found 127.0.0.1:8080, expected another port than listen.address (0.0.0.0:8080)".to_owned()),
        ("[limits]\nhead_bytes = 100", "p.toml:2: limits.head_bytes: found 100, expected an integer from 1024 to 1048576".to_owned()),
        ("[limits]\nheaders = 1.5", "p.toml:2: limits.headers: found 1.5, expected an integer from 16 to 1024".to_owned()),
        ("[limits]\nmetric_models = -1", "p.toml:2: limits.metric_models: found -1, expected an integer from 0 to 10000".to_owned()),
        ("[limits]\nbody_bytes = 10\nbody_memory_bytes = 11", "p.toml:3: limits.body_memory_bytes: found 11, expected at most limits.body_bytes (10)".to_owned()),
        ("[timeouts]\ndrain = 10", format!("p.toml:2: timeouts.drain: found 10, expected {DURATION}")),
        ("[timeouts]\ndrain = \"0s\"", format!("p.toml:2: timeouts.drain: found \"0s\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"1.5s\"", format!("p.toml:2: timeouts.drain: found \"1.5s\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"off\"", format!("p.toml:2: timeouts.drain: found \"off\", expected {DURATION}")),
        ("[timeouts]\nendpoint_keep_alive = \"off\"", format!("p.toml:2: timeouts.endpoint_keep_alive: found \"off\", expected {DURATION}")),
        ("[timeouts]\ndrain = \"99999999999999999999h\"", format!("p.toml:2: timeouts.drain: found \"99999999999999999999h\", expected {DURATION}")),
        ("[timeouts]\nidle = false", format!("p.toml:2: timeouts.idle: found false, expected \"off\" or {DURATION}")),
        ("[timeouts]\nrequest = \"never\"", format!("p.toml:2: timeouts.request: found \"never\", expected \"off\" or {DURATION}")),
        ("[timeouts]\nendpoint_unreachable = \"999ms\"", "p.toml:2: timeouts.endpoint_unreachable: found \"999ms\", expected \"off\" or a duration such as \"4s\", \"5m\" or \"1h\", from 1s to 24h".to_owned()),
        ("[headers]\nvia = \"a b\"", r#"p.toml:2: headers.via: found "a b", expected "off" or a name without blanks, such as "penstock""#.to_owned()),
        ("[headers]\nvia = \"\"", r#"p.toml:2: headers.via: found "", expected "off" or a name without blanks, such as "penstock""#.to_owned()),
        ("[headers]\nx_forwarded = \"on\"", r#"p.toml:2: headers.x_forwarded: found "on", expected "append" or "replace" or "off""#.to_owned()),
        ("[headers]\nforwarded = true", r#"p.toml:2: headers.forwarded: found true, expected "append" or "replace" or "off""#.to_owned()),
        ("[errors]\nformat = \"html\"", r#"p.toml:2: errors.format: found "html", expected "openai" or "plain""#.to_owned()),
        ("[tracing]\notlp_endpoint = \"127.0.0.1:4317\"", r#"p.toml:2: tracing.otlp_endpoint: found "127.0.0.1:4317", expected "off" or a URL such as "http://127.0.0.1:4317""#.to_owned()),
        ("[tracing]\notlp_endpoint = \"https://a:4317\"", r#"p.toml:2: tracing.otlp_endpoint: found "https://a:4317", expected "off" or a URL such as "http://127.0.0.1:4317""#.to_owned()),
        ("[tracing]\nsampling_ratio = 1.5", "p.toml:2: tracing.sampling_ratio: found 1.5, expected a number from 0 to 1".to_owned()),
        ("[tracing]\nsampling_ratio = nan", "p.toml:2: tracing.sampling_ratio: found nan, expected a number from 0 to 1".to_owned()),
        ("[tracing]\nqueue_spans = 0", "p.toml:2: tracing.queue_spans: found 0, expected an integer from 1 to 1048576".to_owned()),
        ("[bbr]\nenabled = \"yes\"", r#"p.toml:2: bbr.enabled: found "yes", expected true or false"#.to_owned()),
        ("[bbr]\nheader = \"Content-Length\"", r#"p.toml:2: bbr.header: found "Content-Length", expected the name of a header that does not frame the message"#.to_owned()),
        ("[bbr]\ndefault_model = \"\"", r#"p.toml:2: bbr.default_model: found "", expected a text that is not empty"#.to_owned()),
        ("[bbr]\nmissing_model = \"fail\"", r#"p.toml:2: bbr.missing_model: found "fail", expected "pass" or "default" or "reject""#.to_owned()),
        ("[bbr]\nmissing_model = \"default\"", r#"p.toml:2: bbr.missing_model: found "default" without a default_model, expected default_model beside it"#.to_owned()),
        ("[bbr]\nmissing_model = \"pass\"\ndefault_model = \"m\"", r#"p.toml:3: bbr.default_model: found a model that nothing uses, expected missing_model = "default" beside it"#.to_owned()),
        ("[bbr]\nbase_model_header = \"x-gateway-model-name\"", "p.toml:2: bbr.base_model_header: found x-gateway-model-name, expected another header than bbr.header (x-gateway-model-name)".to_owned()),
        ("[bbr]\nbase_models = [\"a\"]", r#"p.toml:2: bbr.base_models: found an array, expected a table of adapters and base models, such as { "sql-lora" = "llama-3.1-8b" }"#.to_owned()),
        ("[bbr.base_models]\na = \"\"", r#"p.toml:2: bbr.base_models.a: found "", expected a text that is not empty"#.to_owned()),
        ("[bbr.base_models]\na = \"b\"\nb = \"c\"", r#"p.toml:1: bbr.base_models: found "b" for "a", itself an adapter, expected base models that have none"#.to_owned()),
        ("[steering]\nmode = \"on\"", r#"p.toml:2: steering.mode: found "on", expected "auto" or "local" or "ingress" or "off""#.to_owned()),
        ("[steering]\nmin_bytes = 10\nmax_remote_bytes = 9", "p.toml:3: steering.max_remote_bytes: found 9, expected 0, or at least steering.min_bytes (10)".to_owned()),
        ("[steering]\nclient_send_buffer = 1", "p.toml:2: steering.client_send_buffer: found 1, expected an integer from 32768 to 67108864".to_owned()),
        ("[steering]\nendpoint_receive_buffer = 99999999999", "p.toml:2: steering.endpoint_receive_buffer: found 99999999999, expected an integer from 16384 to 67108864".to_owned()),
        ("[steering]\nforce = 1", "p.toml:2: steering.force: found 1, expected true or false".to_owned()),
        ("[steering]\nmax_flows = 0", "p.toml:2: steering.max_flows: found 0, expected an integer from 1 to 1048576".to_owned()),
    ];
    for (section, expected) in cases {
        assert_message(&format!("{section}\n{POOL}"), &expected);
    }
}

#[test]
fn bad_pools() {
    let cases = [
        ("", "p.toml:1: pools: found none, expected at least one [[pools]] section"),
        ("pools = [1]", "p.toml:1: pools: found 1, expected [[pools]] sections"),
        (
            "[[pools]]\nendpoints = [\"127.0.0.1:8000\"]",
            "p.toml:1: pools[0].name: found nothing, expected the name of the pool",
        ),
        (
            "[[pools]]\nname = \"a b\"\nendpoints = [\"127.0.0.1:8000\"]",
            r#"p.toml:2: pools[0].name: found "a b", expected 1 to 253 letters, digits or any of . _ - /"#,
        ),
        (
            "[[pools]]\nname = \"a\"",
            r#"p.toml:1: pools[0].endpoints: found none, expected at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        ),
        (
            "[[pools]]\nname = \"a\"\npassthrough = true",
            r#"p.toml:1: pools[0].endpoints: found none, expected at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = \"127.0.0.1:8000\"",
            r#"p.toml:3: pools[0].endpoints: found "127.0.0.1:8000", expected an array of ip:port"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\n  \"127.0.0.1:8000\",\n  \"127.0.0.1:0\",\n]",
            r#"p.toml:5: pools[0].endpoints[1]: found "127.0.0.1:0", expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8000\",\n\"127.0.0.1:8000\"]",
            r#"p.toml:4: pools[0].endpoints[1]: found "127.0.0.1:8000" again, expected each endpoint once"#,
        ),
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8080\"]",
            r#"p.toml:3: pools[0].endpoints[0]: found "127.0.0.1:8080", expected another server than listen.address (0.0.0.0:8080)"#,
        ),
    ];
    for (text, expected) in cases {
        assert_message(text, expected);
    }
    let cases = [
        (
            "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8001\"]",
            r#"p.toml:5: pools[1].name: found "a" again, expected a name that no other pool has"#,
        ),
        (
            "default_upstream = \"127.0.0.1:1\"",
            r#"p.toml:4: pools[0].default_upstream: found failure_mode "closed", which never uses it, expected failure_mode = "open""#,
        ),
        ("failure_mode = \"ajar\"", r#"p.toml:4: pools[0].failure_mode: found "ajar", expected "open" or "closed""#),
        ("picker.kind = \"random\"", r#"p.toml:4: pools[0].picker.kind: found "random", expected "builtin" or "epp""#),
        ("picker = \"epp\"", r#"p.toml:4: pools[0].picker: found "epp", expected a section"#),
        (
            "[pools.picker]\naddress = \"epp:9002\"",
            r#"p.toml:5: pools[0].picker.address: found a setting of an EPP, expected kind = "epp" beside it"#,
        ),
        (
            "[pools.picker]\nkind = \"epp\"",
            "p.toml:4: pools[0].picker.address: found nothing, expected host:port of the EPP",
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), expected);
    }
}

#[test]
fn bad_sources_of_endpoints() {
    const ENTRY: &str =
        r#"expected { address = "ip:port", node = "n1", zone = "a", draining = false }, all but address optional"#;
    let cases = [
        ("ports = [0]", "p.toml:4: pools[0].ports[0]: found 0, expected an integer from 1 to 65535".to_owned()),
        ("ports = [1, 2, 1]", "p.toml:4: pools[0].ports[2]: found 1 again, expected each port once".to_owned()),
        ("ports = [1,2,3,4,5,6,7,8,9]", "p.toml:4: pools[0].ports: found 9 ports, expected at most 8".to_owned()),
        (
            "endpoints_dns = \"models\"",
            r#"p.toml:4: pools[0].endpoints_dns: found "models" without ports, expected ports beside it"#.to_owned(),
        ),
        (
            "endpoints_file = \"\"",
            r#"p.toml:4: pools[0].endpoints_file: found "", expected a text that is not empty"#.to_owned(),
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), &expected);
    }
    let cases = [
        (
            "\"10.0.0.1\"",
            r#"found "10.0.0.1", expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        (
            "{ address = \"10.0.0.1:0\" }",
            r#"found a table, expected ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#,
        ),
        ("{ node = \"a\" }", ENTRY),
        ("{ address = \"10.0.0.1:1\", weight = 1 }", ENTRY),
    ];
    for (element, expected) in cases {
        let messages = messages(&format!("[[pools]]\nname = \"a\"\nendpoints = [\"10.0.0.9:1\", {element}]"));
        assert!(messages.len() == 1 && messages[0].ends_with(expected), "{element}: {messages:?}");
        assert!(messages[0].starts_with("p.toml:3: pools[0].endpoints[1]: "), "{messages:?}");
    }
}

#[test]
fn bad_subsets_and_health() {
    let cases = [
        (
            "[pools.subset]\nprefer = [\"node\"]",
            r#"p.toml:5: pools[0].subset.prefer[0]: found "node" without node.name, expected node.name, --node or PENSTOCK_NODE"#,
        ),
        (
            "[pools.subset]\nprefer = [\"zone\"]\nendpoints = [\"10.0.0.1:1\"]\n[node]\nzone = \"a\"",
            "p.toml:6: pools[0].subset.endpoints: found a second way to choose the subset, expected prefer or endpoints",
        ),
        (
            "[pools.subset]\nempty = \"none\"",
            r#"p.toml:5: pools[0].subset.empty: found "none", expected "all" or "fail""#,
        ),
        (
            "[pools.retry]\nmethods = [\"post\"]",
            r#"p.toml:5: pools[0].retry.methods[0]: found "post", expected a method in capital letters, such as "POST""#,
        ),
        (
            "[pools.retry]\nbudget_percent = 101",
            "p.toml:5: pools[0].retry.budget_percent: found 101, expected an integer from 0 to 100",
        ),
        (
            "[pools.ejection]\nbase = \"2m\"",
            "p.toml:5: pools[0].ejection.base: found a base above max, expected base up to max",
        ),
        (
            "[pools.health]\ninterval = \"1s\"",
            r#"p.toml:4: pools[0].health.path: found nothing, expected the path to ask for, such as "/health""#,
        ),
        (
            "[pools.health]\npath = \"health\"",
            r#"p.toml:5: pools[0].health.path: found "health", expected a path that starts with "/""#,
        ),
        (
            "[dns]\nmin_ttl = \"1h\"",
            "p.toml:5: dns.min_ttl: found a min_ttl above max_ttl, expected min_ttl up to max_ttl",
        ),
    ];
    for (more, expected) in cases {
        assert_message(&format!("{POOL}{more}"), expected);
    }
}

#[test]
fn bad_epps() {
    const HOST_PORT: &str = r#"expected host:port, such as "epp.default.svc:9002""#;
    for address in ["epp", "epp:0", ":9002", "http://epp:9002", "user@epp:9002", "epp:99999", ""] {
        assert_message(
            &format!("{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"{address}\""),
            &format!("p.toml:6: pools[0].picker.address: found \"{address}\", {HOST_PORT}"),
        );
    }
    let cases = [
        ("address = []", "address: found an empty array, expected one value or more"),
        ("address = [\"e:1\", \"e\"]", r#"address[1]: found "e", expected host:port, such as "epp.default.svc:9002""#),
        ("address = [\"e:1\", \"f:1\", \"e:1\"]", r#"address[2]: found "e:1" again, expected each address once"#),
        ("tls = \"on\"", r#"tls: found "on", expected "off" or "insecure" or "ca" or "pinned""#),
        ("tls = \"ca\"", "ca_file: found nothing, expected the file with the CA's certificate"),
        ("ca_file = \"ca.pem\"", r#"ca_file: found a setting that nothing uses, expected tls = "ca" beside it"#),
        (
            "server_name = \"a\"",
            r#"server_name: found a setting that nothing uses, expected tls beside it, and not "off""#,
        ),
        (
            "tls = \"insecure\"\nserver_name = \"a b\"",
            r#"server_name: found "a b", expected a DNS name or an IP address"#,
        ),
        ("tls = \"pinned\"", "pins: found nothing, expected the SHA-256 of at least one public key"),
        (
            "tls = \"pinned\"\npins = [\"00ff\"]",
            r#"pins[0]: found "00ff", expected the SHA-256 of a public key, 64 hexadecimal digits"#,
        ),
        (
            "tls = \"insecure\"\npins = \"00000000000000000000000000000000000000000000000000000000000000ff\"",
            r#"pins: found a setting that nothing uses, expected tls = "pinned" beside it"#,
        ),
        (
            "tls = \"insecure\"\nclient_cert_file = \"a\"",
            "client_cert_file: found no client_key_file beside it, expected both or none",
        ),
        (
            "decision_timeout = 3",
            r#"decision_timeout: found 3, expected "off" or a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#,
        ),
        ("health_port = 0", "health_port: found 0, expected an integer from 1 to 65535"),
        ("health_tls = true", "health_tls: found a setting that nothing uses, expected health_port beside it"),
        (
            "health_port = 1\nhealth_tls = true",
            r#"health_tls: found tls = "off", expected tls beside it, and not "off""#,
        ),
        ("health_service = \"\"", r#"health_service: found "", expected a text that is not empty"#),
        ("response_to_picker = \"all\"", r#"response_to_picker: found "all", expected "headers" or "usage" or "body""#),
        ("response_queue_bytes = 1", "response_queue_bytes: found 1, expected an integer from 65536 to 1073741824"),
        ("header = \"a b\"", r#"header: found "a b", expected the name of a header that does not frame the message"#),
    ];
    for (more, expected) in cases {
        let address = if more.starts_with("address") { "" } else { "address = \"[::1]:1\"\n" };
        let messages = messages(&format!("{POOL}[pools.picker]\nkind = \"epp\"\n{address}{more}"));
        assert_eq!(messages.len(), 1, "{messages:?}");
        assert_eq!(messages[0].split_once(": pools[0].picker.").unwrap().1, expected);
    }
}

#[test]
fn a_pool_that_opens_needs_a_place_to_send_to() {
    assert_message(
        "[[pools]]\nname = \"a\"\nfailure_mode = \"open\"\npassthrough = true\npicker = { kind = \"epp\", address = \"e:1\" }",
        r#"p.toml:3: pools[0].failure_mode: found "open" without a place to send to, expected endpoints or default_upstream"#,
    );
}

/// A default alone says that it is used; so does its rule.
#[test]
fn a_default_model_needs_no_rule_beside_it() {
    for text in ["default_model = \"m\"", "missing_model = \"default\"\ndefault_model = \"m\""] {
        let config = Config::parse(&format!("[bbr]\n{text}\n{POOL}"), "p.toml").unwrap();
        assert_eq!(config.bbr.missing_model, MissingModel::Default("m".into()));
    }
}

#[test]
fn bad_session_headers() {
    assert_message(
        &format!("{POOL}picker.session_header = [\"x-a\", \"content-length\"]"),
        "p.toml:4: pools[0].picker.session_header[1]: found \"content-length\", expected the name of a header that does not frame the message",
    );
}

#[test]
fn everything_wrong_is_reported_in_the_order_of_the_file() {
    let text =
        "[limits]\nheaders = 1\nhead = 2\n[timeouts]\ndrain = 3\n[[pools]]\nname = \"a\"\n[[routes]]\npool = \"b\"";
    let places: Vec<String> = messages(text).iter().map(|m| m.split(": found").next().unwrap().to_owned()).collect();
    let expected = [
        "p.toml:2: limits.headers",
        "p.toml:3: limits.head",
        "p.toml:5: timeouts.drain",
        "p.toml:6: pools[0].endpoints",
        "p.toml:9: routes[0].pool",
    ];
    assert_eq!(places, expected);
}

#[test]
fn broken_toml_names_the_line() {
    for (text, line) in [("[listen\n", 1), ("[listen]\nworkers = \n", 2), ("[a]\nb = 1\nb = 2\n", 3)] {
        let message = &messages(text)[0];
        assert!(message.starts_with(&format!("p.toml:{line}: not valid TOML: ")), "{message}");
    }
}

#[test]
fn overrides_win_and_are_checked() {
    let overrides = Overrides {
        listen: Some("127.0.0.1:1".parse().unwrap()),
        admin: Some("127.0.0.1:2".parse().unwrap()),
        steering: Some(SteeringMode::Off),
        force: true,
        node: Some("n2".into()),
        zone: None,
    };
    let config = Config::parse_with(POOL, "p.toml", &overrides).unwrap();
    assert_eq!(config.listen.address.port(), 1);
    assert_eq!(config.admin.address.port(), 2);
    assert_eq!((config.steering.mode, config.steering.force), (SteeringMode::Off, true));
    assert_eq!(config.node, Node { name: Some("n2".into()), zone: None });

    let colliding = Overrides { listen: Some("127.0.0.1:9901".parse().unwrap()), ..Overrides::default() };
    let errors = Config::parse_with(POOL, "p.toml", &colliding).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "p.toml:1: admin.address: found 127.0.0.1:9901, expected another port than listen.address (127.0.0.1:9901)"
    );
}

#[test]
fn off_is_a_decision_timeout() {
    let text = format!(
        "{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ndecision_timeout = \"off\"\nhealth_interval = \"off\""
    );
    let config = Config::parse(&text, "p.toml").unwrap();
    let expected = Epp { decision_timeout: None, health_interval: None, ..Epp::new("e:1") };
    assert_eq!(config.pools[0].picker, Picker::Epp(expected));
}

/// What `penstock check` says about a client's certificate and key.
#[test]
fn a_client_certificate_is_checked_together_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let (path, write) = (folder.path().join("penstock.toml"), |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
    });
    write(
        "penstock.toml",
        &format!(
            "{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ntls = \"insecure\"\nclient_cert_file = \"c.pem\"\nclient_key_file = \"c.key\"\n"
        ),
    );
    let wrong = || {
        Config::load(&path)
            .unwrap_err()
            .iter()
            .map(|error| error.to_string().split(": found").next().unwrap().rsplit('.').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(wrong(), ["client_cert_file", "client_key_file"]);
    let made = || rcgen::generate_simple_self_signed(["c".to_owned()]).unwrap();
    let (one, other) = (made(), made());
    write("c.pem", &one.cert.pem());
    write("c.key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    assert_eq!(wrong(), ["client_key_file"]);
    write("c.key", &other.signing_key.serialize_pem());
    assert_eq!(wrong(), ["client_key_file"], "another's");
    write("c.key", &one.signing_key.serialize_pem());
    let config = Config::load(&path).unwrap();
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    let beside = |name: &str| folder.path().join(name);
    let expected = ClientCertificate { certificate: beside("c.pem"), key: beside("c.key") };
    assert_eq!(epp.client_certificate, Some(expected));
}

#[test]
fn files_are_found_beside_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("penstock.toml");
    let ca = folder.path().join("ca.pem");
    let tls = format!("{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ntls = \"ca\"\nca_file = \"ca.pem\"\n");
    std::fs::write(&path, tls).unwrap();

    let error = Config::load(&path).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("{}:8: pools[0].picker.ca_file: found {} (", path.display(), ca.display())),
        "{error}"
    );
    assert!(error.ends_with("), expected a PEM file with a certificate"), "{error}");

    std::fs::write(&ca, "not a certificate").unwrap();
    assert!(Config::load(&path).is_err());

    let certificate = rcgen::generate_simple_self_signed(["e".to_owned()]).unwrap();
    std::fs::write(&ca, certificate.cert.pem()).unwrap();
    let config = Config::load(&path).unwrap();
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    assert_eq!(epp.tls, EppTls::Ca(ca));

    let missing = folder.path().join("missing.toml");
    let error = Config::load(&missing).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot be read: ", missing.display())), "{error}");
}

fn endpoints_file(text: &str, name: &str) -> Result<Vec<Endpoint>, String> {
    let (format, listen) = (EndpointsFormat::of(Path::new(name)), address("10.0.0.9:8080"));
    parse_endpoints(text, format, &[8000, 8001], listen).map_err(|error| error.to_string())
}

#[test]
fn files_of_endpoints_say_the_same_as_toml_and_as_json() {
    let toml = r#"endpoints = ["10.0.0.1", "[fd00::1]:80",
        { address = "10.0.0.2:80", node = "n1", zone = "", draining = true }]"#;
    let tables = "[[endpoints]]\naddress = \"10.0.0.1\"\n[[endpoints]]\naddress = \"[fd00::1]:80\"\n\
                  [[endpoints]]\naddress = \"10.0.0.2:80\"\nnode = \"n1\"\ndraining = true";
    let json = r#"{"endpoints": ["10.0.0.1", "[fd00::1]:80",
        {"address": "10.0.0.2:80", "node": "n1", "zone": null, "draining": true}]}"#;
    let last = Endpoint { node: Some("n1".into()), draining: true, ..address("10.0.0.2:80").into() };
    let mut expected: Vec<Endpoint> =
        ["10.0.0.1:8000", "10.0.0.1:8001", "[fd00::1]:80"].map(|a| address(a).into()).into();
    expected.push(last);
    for (text, name) in [(toml, "e.toml"), (tables, "endpoints"), (json, "e.JSON")] {
        assert_eq!(endpoints_file(text, name).as_ref(), Ok(&expected), "{name}");
    }
    for (text, name) in [("endpoints = []", "e.toml"), (r#"{"endpoints": []}"#, "e.json")] {
        assert_eq!(endpoints_file(text, name), Ok(vec![]), "{name}");
    }
}

#[test]
fn bad_files_of_endpoints() {
    let cases = [
        ("e.toml", "", "line 1: missing field `endpoints`"),
        ("e.toml", "endpoints = [\n\"10.0.0.1:80\",\n", "line 2: unclosed array, expected `]`"),
        (
            "e.toml",
            "\nendpoints = [{ address = \"10.0.0.1:80\", weight = 1 }]",
            r#"line 2: "ip:port" or { address = "ip:port", node = "n1", zone = "a", draining = false }"#,
        ),
        (
            "e.json",
            r#"{"endpoints": [5]}"#,
            r#""ip:port" or { address = "ip:port", node = "n1", zone = "a", draining = false } at line 1 column 17"#,
        ),
        ("e.json", r#"{"endpoints": ["10.0.0.1:80"]"#, "EOF while parsing an object at line 1 column 29"),
        ("e.json", r#"{"endpoint": []}"#, "unknown field `endpoint`, expected `endpoints` at line 1 column 11"),
        (
            "e.json",
            r#"{"endpoints": ["10.0.0.1:80", "model:80"]}"#,
            r#"endpoints[1]: found "model:80", expected ip:port of a server, or ip where the pool has ports"#,
        ),
        (
            "e.toml",
            r#"endpoints = ["10.0.0.9:8080"]"#,
            r#"endpoints[0]: found "10.0.0.9:8080", expected another server than listen.address (10.0.0.9:8080)"#,
        ),
    ];
    for (name, text, expected) in cases {
        assert_eq!(endpoints_file(text, name), Err(expected.to_owned()), "{text}");
    }
}
