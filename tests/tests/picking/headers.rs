//! Fields that the agent removes and adds: what clients may not set, and what picker, endpoint and client are told about a
//! message's way.

use penstock_agent::config::{Forwarding, HostPattern, Route};
use penstock_tests::{
    Client, ModelServer, Plan, Request, Stage,
    agent::builtin_pool,
    model_server::{Echo, Options},
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, header, reply},
    stage::{echo, epp, json},
};

/// The fields with which a client could pose as the gateway or picker, including the configured ones.
const CONTROL: [&str; 21] = [
    "x-penstock-body-length",
    "x-gateway-destination-endpoint",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-gateway-destination-endpoint-anything",
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-worker-instance-id",
    "x-dynamo-routing-mode",
    "x-dynamo-prefill-worker-id",
    "x-dynamo-decode-worker-id",
    "x-dynamo-dp-rank",
    "x-dynamo-token-data",
    "x-dynamo-backend-instance-id",
    "x-envoy-original-dst-host",
    "x-envoy-upstream-rq-timeout-ms",
    "x-gateway-model-name",
    "x-pick",
    "x-other-pick",
];

/// Each name with dashes, with underscores, and in capitals.
fn spellings() -> Vec<String> {
    let of =
        |name: &&str| [(*name).to_owned(), name.replace('-', "_"), name.to_uppercase(), name.replacen('-', "_", 1)];
    CONTROL.iter().flat_map(of).collect()
}

/// E21: for every pool, and for the pick headers of all pools.
#[tokio::test]
async fn control_fields_from_client_in_any_spelling_are_removed() {
    const MARK: &str = "6.6.6.6:6";
    let plain = ModelServer::start(Options::default()).await.unwrap();
    let mut stage = Stage::with(Production::new, |config| {
        epp(config).header = "x-pick".parse().unwrap();
        config.pools[0].name = "asks".to_owned();
        let mut other = config.pools[0].clone();
        other.name = "other".to_owned();
        config.pools.extend([builtin_pool(&[plain.addr]), other]);
        let penstock_agent::config::Picker::Epp(other) = &mut config.pools[2].picker else { unreachable!() };
        other.header = "x-other-pick".parse().unwrap();
        let to = |host: &str, pool: &str| Route { hosts: vec![HostPattern::Exact(host.into())], ..Route::to(pool) };
        config.routes = vec![to("asks", "asks"), to("plain", "default")];
    })
    .await;
    for host in ["asks", "plain"] {
        for body in [Some(json("m", 10)), None] {
            let request = body.map_or_else(|| Request::get("/test/echo"), echo).header("host", host);
            // A head takes 128 fields.
            for names in spellings().chunks(60) {
                let posing = names.iter().fold(request.clone(), |request, name| request.header(name, MARK));
                let response = stage.request(&posing).await;
                let seen = response.echoed();
                assert!(!seen.headers.iter().any(|(_, value)| value.contains(MARK)), "{host}: {:?}", seen.headers);
                assert_eq!(response.served_by() == Some(plain.addr), host == "plain");
            }
        }
    }
    let told = stage.epp.streams();
    assert_eq!(told.len(), 4);
    for stream in told {
        assert!(
            !stream.request_headers().iter().any(|(_, value)| value.contains(MARK)),
            "{:?}",
            stream.request_headers()
        );
    }
}

/// E21: the pick fields are for the agent only; fields about other endpoints reach the endpoint.
#[tokio::test]
async fn pick_fields_do_not_reach_endpoint() {
    let mut stage = Stage::with(
        |all| {
            let picked = all[0].to_string();
            Answering::new(move |_| {
                let fields = [
                    ("x-pick", picked.as_str()),
                    ("x-gateway-destination-endpoint", picked.as_str()),
                    ("x-gateway-destination-endpoint-scores", "1"),
                    ("x-prefiller-host-port", "10.0.0.7:8000"),
                ];
                vec![reply::request_headers(reply::mutation(&fields))]
            })
        },
        |config| epp(config).header = "x-pick".parse().unwrap(),
    )
    .await;
    let seen = stage.request(&echo("{}")).await.echoed();
    for name in ["x-pick", "x-gateway-destination-endpoint", "x-gateway-destination-endpoint-scores"] {
        assert_eq!(seen.header(name), None, "{name}");
    }
    assert_eq!(seen.header("x-prefiller-host-port"), Some("10.0.0.7:8000"));
}

/// Hop-by-hop fields, those that Connection names, and variants of framing fields.
#[tokio::test]
async fn hop_by_hop_fields_are_not_forwarded() {
    let mut stage = Stage::new(Production::new).await;
    let request = echo(json("m", 10))
        .header("connection", "x-mine, keep-alive, content-length")
        .header("x-mine", "1")
        .header("keep-alive", "timeout=5")
        .header("te", "trailers")
        .header("proxy-authorization", "secret")
        .header("proxy-connection", "close")
        .header("trailer", "x-late")
        .header("content_length", "0")
        .header("transfer_encoding", "chunked")
        .header("x-end-to-end", "1");
    let seen = stage.request(&request).await.echoed();
    for name in [
        "connection",
        "x-mine",
        "keep-alive",
        "te",
        "proxy-authorization",
        "proxy-connection",
        "trailer",
        "content_length",
        "transfer_encoding",
    ] {
        assert_eq!(seen.header(name), None, "{name}");
    }
    assert_eq!((seen.header("x-end-to-end"), seen.body_framing.as_str()), (Some("1"), "content-length"));
    let fields = [("keep-alive", "timeout=5"), ("connection", "x-hop"), ("x-hop", "1"), ("x-end", "1")];
    let headers = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let response = stage.request(&Plan { headers, ..Plan::default() }.request()).await;
    assert_eq!((response.header("keep-alive"), response.header("x-hop")), (None, None));
    assert_eq!((response.header("connection"), response.header("x-end")), (None, Some("1")));
}

fn of_the_client(seen: &Echo) -> [Option<&str>; 6] {
    ["via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port", "forwarded"]
        .map(|name| seen.header(name))
}

#[tokio::test]
async fn forwarded_fields_follow_configuration() {
    let said = |request: Request| {
        request
            .header("host", "llm.example:8443")
            .header("via", "1.1 front")
            .header("x-forwarded-for", "10.0.0.1")
            .header("x-forwarded-proto", "https")
            .header("x-forwarded-host", "front.example")
            .header("forwarded", "for=10.0.0.1")
    };
    let own = r#"for=127.0.0.1;host="llm.example:8443";proto=http"#;
    let appended = format!("for=10.0.0.1, {own}");
    let (host, port) = (Some("llm.example:8443"), Some("8443"));
    #[rustfmt::skip]
    let rows = [
        (Some("penstock"), Forwarding::Append, Forwarding::Off,
         [Some("1.1 front, 1.1 penstock"), Some("10.0.0.1, 127.0.0.1"), Some("https"), Some("front.example"), Some("443"), Some("for=10.0.0.1")]),
        (Some("edge"), Forwarding::Replace, Forwarding::Replace,
         [Some("1.1 front, 1.1 edge"), Some("127.0.0.1"), Some("http"), host, port, Some(own)]),
        (None, Forwarding::Off, Forwarding::Append,
         [Some("1.1 front"), Some("10.0.0.1"), Some("https"), Some("front.example"), None, Some(appended.as_str())]),
    ];
    for (via, x_forwarded, forwarded, expected) in rows {
        let mut stage = Stage::with(Production::new, |config| {
            config.headers.via = via.map(str::to_owned);
            (config.headers.x_forwarded, config.headers.forwarded) = (x_forwarded, forwarded);
        })
        .await;
        let response = stage.request(&said(echo(json("m", 10)))).await;
        assert_eq!(of_the_client(&response.echoed()), expected);
        assert_eq!(response.header("via"), via.map(|name| format!("1.1 {name}")).as_deref());
        // The picker gets the same fields.
        let told = stage.epp.streams()[0].request_headers();
        assert_eq!(header(&told, "x-forwarded-for"), expected[1]);
        assert_eq!(header(&told, "forwarded"), expected[5]);
    }
}

/// Picker, endpoint and, if configured, the client get the same id, whoever sends the response.
#[tokio::test]
async fn request_id_is_same_for_picker_endpoint_and_client() {
    let mut stage = Stage::with(Production::new, |config| config.headers.request_id_to_client = true).await;
    let theirs = vec![("x-request-id".to_owned(), "theirs".to_owned())];
    for own in [None, Some("mine"), Some("")] {
        let request = own.into_iter().fold(echo(json("m", 10)), |request, id| request.header("x-request-id", id));
        let response = stage.request(&request).await;
        let seen = response.echoed();
        let id = seen.header("x-request-id").unwrap();
        match own {
            Some("mine") => assert_eq!(id, "mine"),
            _ => assert_eq!(id.len(), 36, "{id}"),
        }
        assert_eq!(response.header("x-request-id"), Some(id));
        assert_eq!(header(&stage.epp.streams().last().unwrap().request_headers(), "x-request-id"), Some(id));
    }
    let plan = Plan { headers: theirs.clone(), ..Plan::default() };
    let response = stage.request(&plan.request().header("x-request-id", "mine")).await;
    assert_eq!(response.header("x-request-id"), Some("mine"));
    let refused = stage.request(&echo("{").header("x-request-id", "mine")).await;
    assert_eq!((refused.status(), refused.header("x-request-id")), (400, Some("mine")));

    let immediate = Fault::At(Moment::RequestHeaders, Harm::Immediate(429));
    let faulty = |all: &[_]| Faulty::new(Production::new(all), immediate);
    let mut asked = Stage::with(faulty, |config| config.headers.request_id_to_client = true).await;
    let response = asked.request(&echo("{}").header("x-request-id", "mine")).await;
    assert_eq!((response.status(), response.header("x-request-id")), (429, Some("mine")));

    // Off by default; an endpoint's own field passes.
    let mut quiet = Stage::new(Production::new).await;
    assert_eq!(quiet.request(&echo("{}").header("x-request-id", "mine")).await.header("x-request-id"), None);
    let response = quiet.request(&Plan { headers: theirs, ..Plan::default() }.request()).await;
    assert_eq!(response.header("x-request-id"), Some("theirs"));
    let refused = quiet.request(&echo("{").header("x-request-id", "mine")).await;
    assert_eq!((refused.status(), refused.header("x-request-id")), (400, None));
}

/// Only the agent sets the reason header.
#[tokio::test]
async fn reason_header_from_endpoint_is_removed() {
    let stage = Stage::new(Production::new).await;
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    let headers = vec![("x-penstock-reason".to_owned(), "no_endpoint".to_owned())];
    let response = client.request(&Plan { status: 503, headers, ..Plan::default() }.request()).await.unwrap();
    assert_eq!((response.status(), response.header("x-penstock-reason")), (503, None));
}
