//! Checks that every setting is read: each row sets one to a value other than its default.

use std::{path::Path, time::Duration};

use http::{HeaderName, Method};

use super::{
    super::settings::{SettingKey, Settings as _, Shape},
    *,
};

/// A section, a setting in it, and whether the configuration says the same.
type Row = (&'static str, &'static str, fn(&Config) -> bool);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn header(name: &'static str) -> HeaderName {
    HeaderName::from_static(name)
}

fn epp(config: &Config) -> &Epp {
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    epp
}

const PIN: &str = r#"pins = ["00000000000000000000000000000000000000000000000000000000000000fF"]"#;

const ROWS: &[Row] = &[
    ("[listen]", r#"address = "[::1]:80""#, |c| c.listen.address == address("[::1]:80")),
    ("[listen]", "workers = 3", |c| c.listen.workers == 3),
    ("[listen]", "max_connections = 1_000", |c| c.listen.max_connections == 1000),
    ("[listen]", "http2_max_streams = 0", |c| c.listen.http2_max_streams == 0),
    ("[listen]", "upgrades = []", |c| c.listen.upgrades.is_empty()),
    ("[listen]", "http2_resets = 2", |c| c.listen.http2_resets == 2),
    ("[listen]", "http2_control_frames = 100", |c| c.listen.http2_control_frames == 100),
    ("[listen]", r#"half_close = "answer""#, |c| c.listen.half_close == HalfClose::Answer),
    ("[listen]", "proxy_protocol = true", |c| c.listen.proxy_protocol),
    ("[listen]", r#"max_connection_age = "9m""#, |c| c.listen.max_connection_age == Some(seconds(540))),
    ("[listen]", "tls_handshakes = 4", |c| c.listen.tls_handshakes == 4),
    ("[listen.tls]", r#"address = "[::1]:81""#, |c| tls(c).address == address("[::1]:81")),
    ("[listen.tls]", r#"cert_file = "/a.crt""#, |c| tls(c).cert_file == Path::new("/a.crt")),
    ("[listen.tls]", r#"key_file = "/a.key""#, |c| tls(c).key_file == Path::new("/a.key")),
    ("[listen.tls]", r#"client_ca_file = "/c.pem""#, |c| tls(c).client_ca_file.as_deref() == Some(Path::new("/c.pem"))),
    ("[listen.tls]", r#"client_certificates = "optional""#, |c| {
        tls(c).client_certificates == ClientCertificates::Optional
    }),
    ("[listen.tls]", "proxy_protocol = true", |c| tls(c).proxy_protocol),
    ("[listen.cors]", r#"allow_origins = ["https://*.a.example"]"#, |c| {
        let (scheme, name) = ("https://".to_owned(), ".a.example".to_owned());
        cors(c).allow_origins == [OriginPattern::Below { scheme, name }]
    }),
    ("[listen.cors]", r#"allow_methods = ["PUT"]"#, |c| cors(c).allow_methods == [Method::PUT]),
    ("[listen.cors]", r#"allow_headers = ["X-A"]"#, |c| cors(c).allow_headers == [AllowedHeader::Named(header("x-a"))]),
    ("[listen.cors]", r#"expose_headers = ["X-B"]"#, |c| cors(c).expose_headers == [header("x-b")]),
    ("[listen.cors]", "allow_credentials = true", |c| cors(c).allow_credentials),
    ("[listen.cors]", r#"max_age = "1h""#, |c| cors(c).max_age == seconds(3600)),
    ("[admin]", r#"address = "127.0.0.1:0""#, |c| c.admin.address == address("127.0.0.1:0")),
    ("[limits]", "head_bytes = 0x400", |c| c.limits.head_bytes == 1024),
    ("[limits]", "head_fields = 16", |c| c.limits.headers == 16),
    ("[limits]", "body_bytes = 5", |c| c.limits.body_bytes == 5),
    ("[limits]", "body_memory_bytes = 4", |c| c.limits.body_memory_bytes == 4),
    ("[limits]", "total_body_memory_bytes = 7", |c| c.limits.total_body_bytes == 7),
    ("[limits]", "total_spill_bytes = 0", |c| c.limits.total_spill_bytes == 0),
    ("[limits]", "decoded_body_bytes = 8", |c| c.limits.decoded_body_bytes == 8),
    ("[limits]", "body_min_rate = 9", |c| c.limits.body_min_rate == 9),
    ("[limits]", "metric_models = 3", |c| c.limits.metric_models == 3),
    ("[limits]", "linger_bytes = 6", |c| c.limits.linger_bytes == 6),
    ("[timeouts]", r#"head = "1ms""#, |c| c.timeouts.head == Some(Duration::from_millis(1))),
    ("[timeouts]", r#"body = "2s""#, |c| c.timeouts.body == Some(seconds(2))),
    ("[timeouts]", r#"keep_alive = "3m""#, |c| c.timeouts.keep_alive == Some(seconds(180))),
    ("[timeouts]", r#"connect = "4h""#, |c| c.timeouts.connect == Some(seconds(4 * 3600))),
    ("[timeouts]", r#"first_byte = "off""#, |c| c.timeouts.first_byte.is_none()),
    ("[timeouts]", r#"idle = "off""#, |c| c.timeouts.idle.is_none()),
    ("[timeouts]", r#"request = "5m""#, |c| c.timeouts.request == Some(seconds(300))),
    ("[timeouts]", r#"dispatch = "8s""#, |c| c.timeouts.dispatch == Some(seconds(8))),
    ("[timeouts]", r#"endpoint_keep_alive = "5s""#, |c| c.timeouts.endpoint_keep_alive == seconds(5)),
    ("[timeouts]", r#"endpoint_unreachable = "1s""#, |c| c.timeouts.endpoint_unreachable == Some(seconds(1))),
    ("[timeouts]", r#"drain = "24h""#, |c| c.timeouts.drain == seconds(24 * 3600)),
    ("[timeouts]", r#"lame_duck = "7s""#, |c| c.timeouts.lame_duck == Some(seconds(7))),
    ("[timeouts]", r#"linger = "6s""#, |c| c.timeouts.linger == seconds(6)),
    ("[timeouts]", r#"client_unreachable = "off""#, |c| c.timeouts.client_unreachable.is_none()),
    ("[headers]", r#"via = "gw.example:8080""#, |c| c.headers.via.as_deref() == Some("gw.example:8080")),
    ("[headers]", r#"x_forwarded = "replace""#, |c| c.headers.x_forwarded == Forwarding::Replace),
    ("[headers]", r#"forwarded = "append""#, |c| c.headers.forwarded == Forwarding::Append),
    ("[headers]", r#"client_certificate = "X-C""#, |c| c.headers.client_certificate == Some(header("x-c"))),
    ("[headers]", "request_id_to_client = true", |c| c.headers.request_id_to_client),
    ("[headers]", r#"client_hints = ["latency"]"#, |c| c.headers.client_hints == [ClientHint::Latency]),
    ("[errors]", r#"format = "plain""#, |c| c.errors.format == ErrorFormat::Plain),
    ("[bbr]", "enabled = true", |c| c.bbr.enabled),
    ("[bbr]", r#"model_header = "X-Model""#, |c| c.bbr.header == header("x-model")),
    ("[bbr]", r#"missing_model = "default""#, |c| c.bbr.missing_model == MissingModel::Default("m".into())),
    ("[bbr]", r#"default_model = "m""#, |c| c.bbr.missing_model == MissingModel::Default("m".into())),
    ("[bbr]", r#"base_model_header = "X-Base""#, |c| c.bbr.base_model_header == header("x-base")),
    ("[bbr]", r#"base_models = { "l 1" = "b", b = "b" }"#, |c| {
        c.bbr.base_models == ["l 1", "b"].map(|model| (model.to_owned(), "b".to_owned())).into()
    }),
    ("[models]", r#"list = "merged""#, |c| c.models.list == ModelList::Merged),
    ("[models]", r#"timeout = "1s""#, |c| c.models.timeout == seconds(1)),
    ("[steering]", r#"interfaces = "eth0, c0""#, |c| {
        c.steering.interfaces == Interfaces::Named(vec!["eth0".to_owned(), "c0".to_owned()])
    }),
    ("[steering]", r#"bpffs = "/b""#, |c| c.steering.bpffs == Bpffs::At("/b".into())),
    ("[steering]", r#"at_stop = "leave""#, |c| c.steering.at_stop == AtStop::Leave),
    ("[steering]", r#"mode = "ingress""#, |c| c.steering.mode == SteeringMode::Ingress),
    ("[steering]", r#"cgroup = "/cgroup""#, |c| c.steering.cgroup.as_deref() == Some(Path::new("/cgroup"))),
    ("[steering]", "min_bytes = 1", |c| c.steering.min_bytes == 1),
    ("[steering]", "max_remote_bytes = 0", |c| c.steering.max_remote_bytes == 0),
    ("[steering]", "client_send_buffer = 32768", |c| c.steering.client_send_buffer == 32_768),
    ("[steering]", "endpoint_receive_buffer = 67108864", |c| c.steering.endpoint_receive_buffer == 67_108_864),
    ("[steering]", "max_flows = 7", |c| c.steering.max_flows == 7),
    ("[steering]", "force = true", |c| c.steering.force),
    ("[tracing]", r#"otlp_endpoint = "http://[::1]:4317/""#, |c| {
        c.tracing.otlp_endpoint.as_deref() == Some("http://[::1]:4317/")
    }),
    ("[tracing]", "sampling_ratio = 0.25", |c| c.tracing.sampling_ratio.get() == 0.25),
    ("[tracing]", r#"service_name = "edge""#, |c| c.tracing.service_name == "edge"),
    ("[tracing]", "queue_spans = 8", |c| c.tracing.queue_spans == 8),
    ("[tracing]", r#"export_interval = "2s""#, |c| c.tracing.export_interval == seconds(2)),
    ("[process]", r#"user = "1000:2000""#, |c| c.process.user == Some(User { uid: 1000, gid: 2000 })),
    ("[process]", "groups = [3000, 4000]", |c| c.process.groups == [3000, 4000]),
    ("[process]", r#"upgrade_socket = "/u.sock""#, |c| c.process.upgrade_socket == Some("/u.sock".into())),
    ("[process]", r#"upgrade_drain = "off""#, |c| c.process.upgrade_drain.is_none()),
    ("[node]", r#"name = "n1""#, |c| c.node.name.as_deref() == Some("n1")),
    ("[node]", r#"zone = "a""#, |c| c.node.zone.as_deref() == Some("a")),
    ("[dns]", r#"servers = ["[::1]:53"]"#, |c| c.dns.servers == [address("[::1]:53")]),
    ("[dns]", r#"timeout = "1s""#, |c| c.dns.timeout == seconds(1)),
    ("[dns]", r#"min_ttl = "2s""#, |c| c.dns.min_ttl == seconds(2)),
    ("[dns]", r#"max_ttl = "3s""#, |c| c.dns.max_ttl == seconds(3)),
    ("[kubernetes]", r#"kubeconfig = "/k""#, |c| c.kubernetes.kubeconfig.as_deref() == Some(Path::new("/k"))),
    ("[kubernetes]", r#"state_dir = "/s""#, |c| c.kubernetes.state_dir.as_deref() == Some(Path::new("/s"))),
    ("[kubernetes]", r#"start_wait = "off""#, |c| c.kubernetes.start_wait.is_none()),
    ("[kubernetes]", r#"coalesce = "1s""#, |c| c.kubernetes.coalesce == seconds(1)),
    ("[kubernetes]", r#"watch_timeout = "2s""#, |c| c.kubernetes.watch_timeout == seconds(2)),
    ("[kubernetes.gateway]", r#"namespace = "infra""#, |c| gateway(c).namespace == "infra"),
    ("[kubernetes.gateway]", r#"name = "g""#, |c| gateway(c).name == "g"),
    ("[kubernetes.gateway]", "port = 8080", |c| gateway(c).port == Some(8080)),
    ("[[pools]]", r#"name = "team/gpu""#, |c| c.pools[0].name == "team/gpu"),
    (
        "[[pools]]",
        r#"endpoints = ["10.0.0.1", { address = "10.0.0.3:80", node = "n1", zone = "a", draining = true }]"#,
        |c| {
            let (node, zone) = (Some("n1".into()), Some("a".into()));
            let listed = ListedEndpoint { address: address("10.0.0.3:80"), node, zone, draining: true };
            let [first, second] = ["10.0.0.1:8000", "10.0.0.1:8001"].map(|text| ListedEndpoint::from(address(text)));
            c.pools[0].endpoints == [first, second, listed]
        },
    ),
    ("[[pools]]", r#"endpoints_dns = "models.svc""#, |c| {
        c.pools[0].endpoints_dns == Some(NamedEndpoints { name: "models.svc".into(), ports: vec![8000, 8001] })
    }),
    ("[[pools]]", r#"endpoints_file = "/e.json""#, |c| {
        c.pools[0].endpoints_file.as_deref() == Some(Path::new("/e.json"))
    }),
    ("[[pools]]", "ports = [8000, 8001]", |c| c.pools[0].ports == [8000, 8001]),
    ("[[pools]]", r#"app_protocol = "https""#, |c| c.pools[0].app_protocol == AppProtocol::Https),
    ("[[pools]]", r#"sse_keepalive = "15s""#, |c| c.pools[0].sse_keepalive == Some(seconds(15))),
    ("[[pools]]", r#"pick_per = "lease""#, |c| c.pools[0].pick_per == PickPer::Lease),
    ("[[pools]]", r#"failure_mode = "open""#, |c| c.pools[0].failure_mode == FailureMode::Open),
    ("[[pools]]", r#"default_upstream = "127.0.0.2:1""#, |c| {
        c.pools[0].default_upstream == Some(address("127.0.0.2:1"))
    }),
    ("[[pools]]", r#"passthrough = ["10.0.0.0/8", "fd00::1"]"#, |c| {
        let networks = ["10.0.0.0/8", "fd00::1"].map(|text| Network::parse(text).unwrap());
        c.pools[0].passthrough == Passthrough::Networks(networks.into())
    }),
    ("[pools.tls]", r#"verify = "pinned""#, |c| matches!(pool_tls(c).verify, ServerTls::Pinned(_))),
    ("[pools.tls]", PIN, |c| {
        pool_tls(c).verify == ServerTls::Pinned(vec![KeyPin(std::array::from_fn(|at| if at == 31 { 0xff } else { 0 }))])
    }),
    ("[pools.tls]", r#"server_name = "m.example""#, |c| pool_tls(c).server_name.as_deref() == Some("m.example")),
    ("[pools.tls]", r#"client_cert_file = "/m.pem""#, |c| {
        pool_tls(c).client_certificate.as_ref().unwrap().certificate == Path::new("/m.pem")
    }),
    ("[pools.tls]", r#"client_key_file = "/m.key""#, |c| {
        pool_tls(c).client_certificate.as_ref().unwrap().key == Path::new("/m.key")
    }),
    ("[pools.pin]", r#"age = "off""#, |c| c.pools[0].pin.age.is_none()),
    ("[pools.lease]", r#"time = "1s""#, |c| c.pools[0].lease.time == seconds(1)),
    ("[pools.lease]", "requests = 2", |c| c.pools[0].lease.requests == 2),
    ("[pools.picker]", r#"kind = "epp""#, |c| matches!(c.pools[0].picker, Picker::Epp(_))),
    ("[pools.picker]", r#"session_header = ["x-session-id", "x-other"]"#, |c| {
        c.pools[0].session_headers == ["x-session-id", "x-other"]
    }),
    ("[pools.picker]", r#"address = ["epp.svc:9002", "[fd00::7]:9002"]"#, |c| {
        epp(c).addresses == ["epp.svc:9002", "[fd00::7]:9002"]
    }),
    ("[pools.picker]", r#"tls = "pinned""#, |c| matches!(epp(c).tls, ServerTls::Pinned(_))),
    ("[pools.picker]", PIN, |c| {
        epp(c).tls == ServerTls::Pinned(vec![KeyPin(std::array::from_fn(|at| if at == 31 { 0xff } else { 0 }))])
    }),
    ("[pools.picker]", r#"server_name = "epp.example""#, |c| epp(c).server_name.as_deref() == Some("epp.example")),
    ("[pools.picker]", r#"client_cert_file = "/c.pem""#, |c| shown(c).certificate == Path::new("/c.pem")),
    ("[pools.picker]", r#"client_key_file = "/c.key""#, |c| shown(c).key == Path::new("/c.key")),
    ("[pools.picker]", r#"connect_timeout = "2s""#, |c| epp(c).connect_timeout == seconds(2)),
    ("[pools.picker]", r#"start_wait = "3s""#, |c| epp(c).start_wait == Some(seconds(3))),
    ("[pools.picker]", r#"unreachable_wait = "3s""#, |c| epp(c).unreachable_wait == Some(Some(seconds(3)))),
    ("[pools.picker]", "unreachable_wait_requests = 5", |c| epp(c).unreachable_wait_requests == 5),
    ("[pools.picker]", "unreachable_wait_bytes = 6", |c| epp(c).unreachable_wait_bytes == 6),
    ("[pools.picker]", r#"decision_timeout = "3s""#, |c| epp(c).decision_timeout == Some(seconds(3))),
    ("[pools.picker]", "open_on_deadline = true", |c| epp(c).open_on_deadline),
    ("[pools.picker]", r#"response_timeout = "off""#, |c| epp(c).response_timeout.is_none()),
    ("[pools.picker]", r#"body_to_picker = "abridged""#, |c| epp(c).body_to_picker == BodyToPicker::Abridged),
    ("[pools.picker]", "body_to_picker_bytes = 1024", |c| epp(c).body_to_picker_bytes == 1024),
    ("[pools.picker]", r#"response_to_picker = "usage""#, |c| epp(c).response_to_picker == ResponseToPicker::Usage),
    ("[pools.picker]", "response_queue_bytes = 65536", |c| epp(c).response_queue_bytes == 65_536),
    ("[pools.picker]", r#"destination_header = "x-pick""#, |c| epp(c).header == header("x-pick")),
    ("[pools.picker]", r#"health_interval = "1s""#, |c| epp(c).health_interval == Some(seconds(1))),
    ("[pools.picker]", "health_port = 9003", |c| epp(c).health_port == Some(9003)),
    ("[pools.picker]", "health_tls = true", |c| epp(c).health_tls),
    ("[pools.picker]", r#"health_service = "x""#, |c| epp(c).health_service == "x"),
    ("[pools.picker.limits]", "fields = 16", |c| epp(c).limits.fields == 16),
    ("[pools.picker.limits]", "field_bytes = 1024", |c| epp(c).limits.bytes == 1024),
    ("[pools.picker.limits]", "messages = 17", |c| epp(c).limits.messages == 17),
    ("[pools.picker.limits]", "metadata_bytes = 1025", |c| epp(c).limits.metadata_bytes == 1025),
    ("[pools.picker.metadata]", "log_bytes = 7", |c| epp(c).metadata.log_bytes == 7),
    ("[pools.picker.metadata]", "log_entries = 8", |c| epp(c).metadata.log_entries == 8),
    ("[pools.picker.metadata]", "log_depth = 9", |c| epp(c).metadata.log_depth == 9),
    ("[pools.picker.metadata]", r#"counters = ["envoy.lb/a/b"]"#, |c| {
        epp(c).metadata.counters == [Attribute { namespace: "envoy.lb".into(), key: "a/b".into() }]
    }),
    ("[pools.subset]", r#"prefer = ["zone", "node"]"#, |c| {
        c.pools[0].subset.prefer == [Locality::Zone, Locality::Node]
    }),
    ("[pools.subset]", r#"empty = "fail""#, |c| c.pools[0].subset.empty == EmptySubset::Fail),
    ("[pools.retry]", "attempts = 0", |c| c.pools[0].retry.attempts == 0),
    ("[pools.retry]", r#"methods = ["POST"]"#, |c| c.pools[0].retry.methods == [Method::POST]),
    ("[pools.retry]", "budget_percent = 5", |c| c.pools[0].retry.budget_percent == 5),
    ("[pools.retry]", "budget_min_per_second = 6", |c| c.pools[0].retry.budget_min_per_second == 6),
    ("[pools.ejection]", "failures = 0", |c| c.pools[0].ejection.failures == 0),
    ("[pools.ejection]", r#"base = "1s""#, |c| c.pools[0].ejection.base == seconds(1)),
    ("[pools.ejection]", r#"max = "2s""#, |c| c.pools[0].ejection.max == seconds(2)),
    ("[pools.ejection]", "max_percent = 100", |c| c.pools[0].ejection.max_percent == 100),
    ("[pools.ejection]", "server_errors = true", |c| c.pools[0].ejection.server_errors),
    ("[pools.health]", r#"path = "/live?full=1""#, |c| health(c).path == "/live?full=1"),
    ("[pools.health]", r#"interval = "1s""#, |c| health(c).interval == seconds(1)),
    ("[pools.health]", r#"timeout = "3s""#, |c| health(c).timeout == seconds(3)),
    ("[pools.health]", "unhealthy_after = 4", |c| health(c).unhealthy_after == 4),
    ("[pools.health]", "healthy_after = 5", |c| health(c).healthy_after == 5),
    ("[pools.timeouts]", r#"body = "1s""#, |c| c.pools[0].timeouts.body == Some(Some(seconds(1)))),
    ("[pools.timeouts]", r#"first_byte = "2s""#, |c| c.pools[0].timeouts.first_byte == Some(Some(seconds(2)))),
    ("[pools.timeouts]", r#"idle = "3s""#, |c| c.pools[0].timeouts.idle == Some(Some(seconds(3)))),
    ("[pools.timeouts]", r#"request = "off""#, |c| c.pools[0].timeouts.request == Some(None)),
    ("[pools.timeouts]", r#"dispatch = "4s""#, |c| c.pools[0].timeouts.dispatch == Some(Some(seconds(4)))),
    ("[[routes]]", r#"host = "*.Example.com.""#, |c| c.routes[0].hosts == [HostPattern::Below(".example.com".into())]),
    ("[[routes]]", r#"path = "/v1/models/""#, |c| c.routes[0].path == Some(PathPattern::Exact("/v1/models/".into()))),
    ("[[routes]]", r#"method = ["GET", "HEAD"]"#, |c| c.routes[0].methods == [Method::GET, Method::HEAD]),
    ("[[routes]]", r#"headers = [{ name = "X-A", value = "b c" }]"#, |c| {
        c.routes[0].headers == [HeaderCondition { name: header("x-a"), value: Some("b c".into()) }]
    }),
    ("[[routes]]", r#"query = [{ name = "q", value = "1" }]"#, |c| {
        c.routes[0].query == [QueryCondition { name: "q".into(), value: Some("1".into()) }]
    }),
    ("[[routes]]", r#"model = "l-*""#, |c| c.routes[0].models == [ModelPattern::Prefix("l-".into())]),
    ("[[routes]]", r#"base_model = "b""#, |c| c.routes[0].base_models == ["b"]),
    ("[[routes]]", r#"pool = "team/gpu""#, |c| c.routes[0].pools == [WeightedPool::new("team/gpu", 1)]),
    ("[routes.timeouts]", r#"body = "off""#, |c| c.routes[0].timeouts.body == Some(None)),
    ("[routes.timeouts]", r#"first_byte = "off""#, |c| c.routes[0].timeouts.first_byte == Some(None)),
    ("[routes.timeouts]", r#"idle = "1s""#, |c| c.routes[0].timeouts.idle == Some(Some(seconds(1)))),
    ("[routes.timeouts]", r#"request = "1h""#, |c| c.routes[0].timeouts.request == Some(Some(seconds(3600)))),
    ("[routes.timeouts]", r#"dispatch = "2s""#, |c| c.routes[0].timeouts.dispatch == Some(Some(seconds(2)))),
    ("[routes.request_headers]", r#"set = [{ name = "X-A", value = "b" }]"#, |c| {
        c.routes[0].request_headers.set == [field("x-a", "b")]
    }),
    ("[routes.request_headers]", r#"add = [{ name = "x-b", value = "" }]"#, |c| {
        c.routes[0].request_headers.add == [field("x-b", "")]
    }),
    ("[routes.request_headers]", r#"remove = ["X-C"]"#, |c| c.routes[0].request_headers.remove == [header("x-c")]),
    ("[routes.rewrite]", r#"host = "other""#, |c| rewrite(c).host.as_deref() == Some("other")),
    ("[routes.rewrite]", r#"path = "/a/""#, |c| rewrite(c).path == Some(PathChange::Full("/a/".into()))),
];

/// Those that exclude a row above.
const EXCLUSIVE: &[Row] = &[
    ("[bbr]", "enabled = false", |c| !c.bbr.enabled),
    ("[[routes]]", "path_prefix = \"/v1/\"\npool = \"a\"", |c| {
        c.routes[0].path == Some(PathPattern::Prefix("/v1".into()))
    }),
    ("[[routes]]", r#"pools = [{ name = "a", weight = 3 }]"#, |c| c.routes[0].pools == [WeightedPool::new("a", 3)]),
    ("[pools.subset]", r#"endpoints = ["127.0.0.1:8000"]"#, |c| {
        c.pools[0].subset.endpoints == [address("127.0.0.1:8000")]
    }),
    ("[[routes]]\npool = \"a\"\npath_prefix = \"/x\"\n[routes.rewrite]", "path_prefix = \"/v1/\"", |c| {
        rewrite(c).path == Some(PathChange::Prefix("/v1".into()))
    }),
    ("[[routes]]\n[routes.redirect]", "scheme = \"https\"\nhost = \"h\"\nport = 1\npath = \"/b\"\nstatus = 308", |c| {
        *redirect(c)
            == Redirect {
                scheme: Some(RedirectScheme::Https),
                host: Some("h".into()),
                port: Some(1),
                path: Some(PathChange::Full("/b".into())),
                status: RedirectStatus::PermanentRedirect,
            }
    }),
    ("[[routes]]\npath_prefix = \"/\"\n[routes.redirect]", "path_prefix = \"/\"", |c| {
        redirect(c).path == Some(PathChange::Prefix(String::new()))
    }),
    ("[pools.picker]", "kind = \"epp\"\naddress = \"e:1\"\ntls = \"ca\"\nca_file = \"/ca.pem\"", |c| {
        epp(c).tls == ServerTls::Ca("/ca.pem".into())
    }),
    ("[pools.tls]", "ca_file = \"/ca.pem\"", |c| pool_tls(c).verify == ServerTls::Ca("/ca.pem".into())),
];

/// Those of a pool without endpoints of its own.
const DISCOVERED: &[Row] = &[
    ("[pools.inference_pool]", "namespace = \"n\"\nname = \"p\"\nversion = \"v1alpha2\"", |c| {
        let (namespace, name) = ("n".to_owned(), "p".to_owned());
        c.pools[0].inference_pool == Some(InferencePoolRef { namespace, name, version: InferencePoolVersion::V1Alpha2 })
    }),
    ("[kubernetes.gateway]\nnamespace = \"n\"\nname = \"g\"\n[pools.inference_pools]", r#"from = "gateway""#, |c| {
        c.pools[0].inference_pools == Some(InferencePools::default())
    }),
    (
        "[pools.inference_pools]",
        "from = \"labels\"\nnamespace = \"n\"\nlabels = \"a=b\"\nversion = \"v1alpha2\"",
        |c| {
            let (namespace, labels) = (Some("n".to_owned()), Some("a=b".to_owned()));
            let version = InferencePoolVersion::V1Alpha2;
            c.pools[0].inference_pools == Some(InferencePools { from: PoolSource::Labels, namespace, labels, version })
        },
    ),
];

fn gateway(config: &Config) -> &GatewayRef {
    config.kubernetes.gateway.as_ref().unwrap()
}

fn rewrite(config: &Config) -> &Rewrite {
    config.routes[0].rewrite.as_ref().unwrap()
}

fn redirect(config: &Config) -> &Redirect {
    config.routes[0].redirect.as_ref().unwrap()
}

fn field(name: &'static str, value: &'static str) -> SetField {
    SetField { name: header(name), value: http::HeaderValue::from_static(value) }
}

fn cors(config: &Config) -> &Cors {
    config.listen.cors.as_ref().unwrap()
}

fn tls(config: &Config) -> &ListenTls {
    config.listen.tls.as_ref().unwrap()
}

fn pool_tls(config: &Config) -> &PoolTls {
    config.pools[0].tls.as_ref().unwrap()
}

fn shown(config: &Config) -> &ClientCertificate {
    epp(config).client_certificate.as_ref().unwrap()
}

fn health(config: &Config) -> &HealthCheck {
    config.pools[0].health.as_ref().unwrap()
}

#[test]
fn every_setting_is_read() {
    let mut text = String::new();
    let mut last = "";
    for (section, setting, _) in ROWS {
        if *section != last {
            text.push_str(&format!("{section}\n"));
            last = section;
        }
        text.push_str(&format!("{setting}\n"));
    }
    let config = Config::parse(&text, "p.toml").unwrap_or_else(|errors| panic!("{errors}\n{text}"));
    for (section, setting, is_read) in ROWS {
        assert!(is_read(&config), "{section} {setting}: {config:?}");
    }
    shown::assert_reads_back(&config);
    for (section, setting, is_read) in EXCLUSIVE {
        let protocol = if *section == "[pools.tls]" { "app_protocol = \"https\"\n" } else { "" };
        let config = Config::parse(&format!("{POOL}{protocol}{section}\n{setting}"), "p.toml").unwrap();
        assert!(is_read(&config), "{section} {setting}: {config:?}");
        shown::assert_reads_back(&config);
    }
    for (section, setting, is_read) in DISCOVERED {
        let config = Config::parse(&format!("[[pools]]\nname = \"a\"\n{section}\n{setting}"), "p.toml").unwrap();
        assert!(is_read(&config), "{section} {setting}: {config:?}");
        shown::assert_reads_back(&config);
    }
}

#[test]
fn every_setting_has_a_row() {
    fn collect(path: &str, keys: &[SettingKey], missing: &mut Vec<String>) {
        for key in keys {
            let below = format!("{path}{}", key.name);
            match &key.shape {
                Shape::Section(keys) | Shape::Sections(keys) => collect(&format!("{below}."), keys, missing),
                Shape::Value { .. } => {
                    let is_row = |(section, setting, _): &Row| {
                        let section = section.lines().last().unwrap_or_default().trim_matches(['[', ']']);
                        setting.lines().any(|line| line.starts_with(&format!("{} = ", key.name)))
                            && format!("{section}.") == *path
                    };
                    if !ROWS.iter().chain(EXCLUSIVE).chain(DISCOVERED).any(is_row) {
                        missing.push(below);
                    }
                }
            }
        }
    }
    let mut missing = Vec::new();
    collect("", &Config::describe(), &mut missing);
    assert!(missing.is_empty(), "no row sets {missing:?}");
}
