//! Traces: the caller's trace continues, the picker's trace context takes precedence, and with a collector the agent adds its
//! own spans.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use penstock_agent::config::{Config, FailureMode, HostPattern, Ratio, Route, SteeringMode};
use penstock_tests::{
    Client, CollectedSpan, Collector, CollectorBehaviour, Plan, Refusing, Request, Stage,
    agent::{TestAgent, builtin_pool},
    eventually,
    model_server::{Echo, Fault as Stall, FaultKind, ModelServer, Options},
    scripted_epp::{
        Answering, Endpoints, Fault, Faulty, Harm, LlmdRouter, Moment, Personality, Production, Script, header, reply,
    },
    stage::{echo, json},
};

use crate::SOON;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn parent(flags: &str) -> String {
    format!("00-{TRACE}-{SPAN}-{flags}")
}

fn to(collector: &Collector) -> impl Fn(&mut Config) {
    let url = collector.url();
    move |config| {
        config.tracing.otlp_endpoint = Some(url.clone());
        config.tracing.export_interval = Duration::from_millis(5);
    }
}

async fn spans(collector: &Collector, count: usize) -> Vec<CollectedSpan> {
    eventually(SOON, || collector.spans().len() >= count).await;
    collector.spans()
}

/// The span of a request, and that of its pick if any.
fn pair(spans: &[CollectedSpan]) -> (&CollectedSpan, Option<&CollectedSpan>) {
    let server = spans.iter().find(|span| span.name != "pick").expect("no span of the request");
    (server, spans.iter().find(|span| span.parent == server.id))
}

fn all<'e>(seen: &'e Echo, name: &str) -> Vec<&'e str> {
    seen.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str()).collect()
}

/// D14.
#[tokio::test]
async fn request_span_joins_callers_trace_and_pick_is_its_child() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let mut stage = Stage::with(Production::new, to(&collector)).await;
    let request = Request::post("/v1/chat/completions", r#"{"model":"m","messages":[],"max_tokens":4}"#)
        .header("content-type", "application/json")
        .header("host", "llm.example:8443")
        .header("user-agent", "test/1")
        .header("x-request-id", "mine")
        .header("traceparent", parent("01"))
        .header("tracestate", "a=1,b@c=2");
    let response = stage.request(&request).await;
    assert_eq!(response.status(), 200);
    let served = response.served_by().unwrap().to_string();

    let spans = spans(&collector, 2).await;
    let (server, pick) = pair(&spans);
    let pick = pick.expect("no span of the pick");
    assert_eq!((spans.len(), server.trace.as_str(), server.parent.as_str()), (2, TRACE, SPAN));
    assert_eq!((pick.trace.as_str(), server.state.as_str(), pick.state.as_str()), (TRACE, "a=1,b@c=2", "a=1,b@c=2"));
    assert_eq!((server.name.as_str(), server.kind as i32, pick.kind as i32), ("POST", 2, 3));
    assert_eq!(server.resource["service.name"], "penstock");
    for (name, value) in [
        ("http.request.method", "POST"),
        ("url.path", "/v1/chat/completions"),
        ("url.scheme", "http"),
        ("network.protocol.version", "1.1"),
        ("server.address", "llm.example"),
        ("server.port", "8443"),
        ("client.address", "127.0.0.1"),
        ("user_agent.original", "test/1"),
        ("http.response.status_code", "200"),
        ("error.type", ""),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "m"),
        ("penstock.request_id", "mine"),
        ("penstock.pool", "default"),
        ("penstock.endpoint", &served),
        ("penstock.reason", "ok"),
        ("penstock.carried_by", "relay"),
    ] {
        assert_eq!(server.get(name), value, "{name}");
    }
    assert!(!server.failed && !pick.failed);
    assert_eq!((pick.get("penstock.picked_by"), pick.get("penstock.endpoints")), ("epp", served.as_str()));
    assert_eq!(pick.get("server.port"), stage.epp.addr.port().to_string());

    let [(event, first_byte, about)] = server.events.as_slice() else { panic!("{:?}", server.events) };
    assert_eq!(event, "first_token");
    let seconds: f64 = about["gen_ai.server.time_to_first_token"].parse().unwrap();
    assert_eq!((seconds * 1e9).round() as u64, first_byte - server.begin);
    let times = [server.begin, pick.begin, pick.end, *first_byte, server.end];
    assert!(times.is_sorted() && pick.begin < pick.end, "{times:?}");
}

/// D14: the picker's and the endpoint's work is within the agent's span.
#[tokio::test]
async fn agent_span_is_parent_of_picker_and_endpoint_spans() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    // It echoes every field.
    let mut stage = Stage::with(|all| LlmdRouter::over(Endpoints::new(all)), to(&collector)).await;
    let request = echo(json("m", 10)).header("traceparent", parent("01")).header("tracestate", "a=1");
    let seen = stage.request(&request).await.echoed();
    let spans = spans(&collector, 2).await;
    let sent = format!("00-{TRACE}-{}-01", pair(&spans).0.id);
    let told = stage.epp.streams()[0].request_headers();
    assert_eq!((header(&told, "traceparent"), header(&told, "tracestate")), (Some(sent.as_str()), Some("a=1")));
    assert_eq!((all(&seen, "traceparent"), all(&seen, "tracestate")), (vec![sent.as_str()], vec!["a=1"]));
}

/// D14, E4.
#[tokio::test]
async fn picker_span_is_parent_of_endpoint_span() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let own = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let script = |all: &[_]| LlmdRouter::over(Endpoints::new(all)).adding(&[("traceparent", &own)]);
    let mut stage = Stage::with(script, to(&collector)).await;
    let seen = stage.request(&echo(json("m", 10)).header("traceparent", parent("01"))).await.echoed();
    assert_eq!(all(&seen, "traceparent"), [own.as_str()]);
}

/// Malformed contexts, with a `tracestate` that must be dropped with them.
fn malformed() -> [String; 6] {
    [
        "nonsense".to_owned(),
        String::new(),
        format!("00-{}-{SPAN}-01", "0".repeat(32)),
        format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
        format!("00-{TRACE}-{SPAN}-01-more"),
        format!("ff-{TRACE}-{SPAN}-01"),
    ]
}

/// D14: W3C Trace Context §4.3.
#[tokio::test]
async fn malformed_context_starts_new_trace() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let mut stage = Stage::with(Production::new, to(&collector)).await;
    let contexts: Vec<_> = malformed().into_iter().map(Some).chain([None]).collect();
    for (number, context) in contexts.into_iter().enumerate() {
        let mut request = echo(json("m", 10)).header("tracestate", "a=1");
        if let Some(context) = &context {
            request = request.header("traceparent", context.clone());
        }
        let seen = stage.request(&request).await.echoed();
        let spans = spans(&collector, 2 * number + 2).await;
        let (server, _) = pair(&spans[2 * number..]);
        assert_eq!((server.parent.as_str(), server.state.as_str()), ("", ""), "{context:?}");
        assert_ne!(server.trace, TRACE);
        assert_eq!(all(&seen, "traceparent"), [format!("00-{}-{}-01", server.trace, server.id)], "{context:?}");
        assert!(all(&seen, "tracestate").is_empty(), "{context:?}");
    }
}

/// D14: without a collector the agent adds no spans; it forwards a valid context.
#[tokio::test]
async fn trace_context_without_collector_passes_through() {
    let mut stage = Stage::new(Production::new).await;
    let request = echo(json("m", 10)).header("traceparent", parent("01")).header("tracestate", "a=1");
    let seen = stage.request(&request).await.echoed();
    let told = stage.epp.streams()[0].request_headers();
    assert_eq!(all(&seen, "traceparent"), [parent("01")]);
    assert_eq!(all(&seen, "tracestate"), ["a=1"]);
    assert_eq!(header(&told, "traceparent"), Some(parent("01").as_str()));
    for context in malformed() {
        let request = echo(json("m", 10)).header("traceparent", context.clone()).header("tracestate", "a=1");
        let seen = stage.request(&request).await.echoed();
        assert!(all(&seen, "traceparent").is_empty() && all(&seen, "tracestate").is_empty(), "{context}");
    }
    let twice = echo(json("m", 10)).header("traceparent", parent("01")).header("traceparent", parent("00"));
    assert!(all(&stage.request(&twice).await.echoed(), "traceparent").is_empty());
}

/// D14: the caller's flag decides if present, otherwise the ratio.
#[tokio::test]
async fn sampling_follows_caller_or_ratio() {
    for (ratio, context, sampled) in [
        (0.0, None, false),
        (0.0, Some("00"), false),
        (0.0, Some("01"), true),
        (1.0, None, true),
        (1.0, Some("00"), false),
    ] {
        let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
        let configure = to(&collector);
        let mut stage = Stage::with(Production::new, |config| {
            configure(config);
            config.tracing.sampling_ratio = Ratio::new(ratio).unwrap();
        })
        .await;
        let mut request = echo(json("m", 10));
        if let Some(flags) = context {
            request = request.header("traceparent", parent(flags));
        }
        let seen = stage.request(&request).await.echoed();
        let [sent] = all(&seen, "traceparent")[..] else { panic!("{seen:?}") };
        assert!(sent.ends_with(if sampled { "-01" } else { "-00" }), "{ratio} {context:?}: {sent}");
        assert_eq!(sent.contains(TRACE), context.is_some());
        // The agent's shutdown sends all queued spans.
        drop(stage);
        assert_eq!(collector.spans().len(), if sampled { 2 } else { 0 }, "{ratio} {context:?}");
    }
}

/// Sends one request and returns its span and the pick's. Ignores how the response ends.
async fn spans_of<S: Script>(
    script: impl FnOnce(&[SocketAddr]) -> S,
    adjust: impl FnOnce(&mut Config),
    request: Request,
) -> (CollectedSpan, Option<CollectedSpan>) {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let configure = to(&collector);
    let mut stage = Stage::with(script, |config| {
        configure(config);
        config.timeouts.idle = Some(Duration::from_millis(100));
        config.routes = vec![Route { hosts: vec![HostPattern::Exact("x".into())], ..Route::to("default") }];
        adjust(config);
    })
    .await;
    stage.client.send(&request).await.unwrap();
    stage.client.head().await.unwrap();
    eventually(SOON, || collector.spans().iter().any(|span| span.name != "pick")).await;
    drop(stage);
    let spans = collector.spans();
    let (server, pick) = pair(&spans);
    (server.clone(), pick.cloned())
}

/// Status, reason, `error.type` and whether it failed; for the pick also the picker and `error.type`.
fn outcome((server, pick): &(CollectedSpan, Option<CollectedSpan>)) -> ([&str; 3], bool, [&str; 2]) {
    let own = ["http.response.status_code", "penstock.reason", "error.type"].map(|name| server.get(name));
    let pick = ["penstock.picked_by", "error.type"].map(|name| pick.as_ref().map_or("none", |pick| pick.get(name)));
    (own, server.failed, pick)
}

/// D14: the reason label of metrics and logs. By convention, a client's error does not fail a server's span.
#[tokio::test]
async fn spans_carry_failure_reason() {
    let request = || echo("{}").header("host", "x");
    let unavailable = Fault::At(Moment::RequestHeaders, Harm::Status(tonic::Code::Unavailable));
    let fails = |all: &[_]| Faulty::new(Production::new(all), unavailable);

    let closed = spans_of(fails, |_| {}, request()).await;
    let failed = ["503", "picker_failed", "picker_failed"];
    assert_eq!(outcome(&closed), (failed, true, ["epp", "picker_failed"]));

    let open = spans_of(fails, |config| config.pools[0].failure_mode = FailureMode::Open, request()).await;
    assert_eq!(outcome(&open), (["200", "ok", ""], false, ["fail_open", ""]));

    let refuses = |_: &[_]| Answering::new(|_| vec![reply::immediate(429, &[], "")]);
    let refused = spans_of(refuses, |_| {}, request()).await;
    assert_eq!(outcome(&refused), (["429", "picker_reply", ""], false, ["epp", ""]));

    let dead = Refusing::new().unwrap().addr;
    let names = move |_: &[_]| Answering::new(move |_| vec![reply::pick(&dead.to_string(), &[])]);
    let away = spans_of(names, |config| config.pools[0].endpoints.push(dead.into()), request()).await;
    assert_eq!(outcome(&away), (["502", "connect", "connect"], true, ["epp", ""]));

    let unrouted = spans_of(Production::new, |_| {}, echo("{}").header("host", "y")).await;
    assert_eq!(outcome(&unrouted), (["404", "no_route", "no_route"], false, ["none", "none"]));

    let malformed = spans_of(Production::new, |_| {}, echo("{").header("host", "x")).await;
    assert_eq!(outcome(&malformed), (["400", "json", "json"], false, ["none", "none"]));

    let unwell = Plan { status: 503, ..Plan::default() };
    let unwell = spans_of(Production::new, |_| {}, unwell.request().header("host", "x")).await;
    assert_eq!(outcome(&unwell), (["503", "ok", "503"], true, ["epp", ""]));

    let stalls = Plan { size: 10_000, fault: Some(Stall { after: 5000, kind: FaultKind::Stall }), ..Plan::default() };
    let broken = spans_of(Production::new, |_| {}, stalls.request().header("host", "x")).await;
    assert_eq!(outcome(&broken), (["200", "idle_timeout", "idle_timeout"], true, ["epp", ""]));
}

async fn builtin(configure: impl FnOnce(&mut Config)) -> (ModelServer, TestAgent, Client) {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, configure);
    let client = Client::connect(agent.addr).await.unwrap();
    (server, agent, client)
}

/// D14.
#[tokio::test]
async fn builtin_pick_has_a_span() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let (_server, _agent, mut client) = builtin(to(&collector)).await;
    assert_eq!(client.request(&echo("{}")).await.unwrap().status(), 200);
    let spans = spans(&collector, 2).await;
    let (_, pick) = pair(&spans);
    let pick = pick.expect("no span of the pick");
    assert_eq!((pick.get("penstock.picked_by"), pick.kind as i32), ("builtin", 1));
}

/// D14: the queue is bounded, and neither requests nor the agent's shutdown wait for it.
#[tokio::test]
async fn silent_collector_loses_only_spans() {
    let collector = Collector::start(CollectorBehaviour::Holds).await.unwrap();
    let configure = to(&collector);
    let (_server, agent, mut client) = builtin(|config| {
        configure(config);
        config.tracing.queue_spans = 8;
    })
    .await;
    assert_eq!(client.request(&echo("{}")).await.unwrap().status(), 200);
    eventually(SOON, || collector.messages() == 1).await;
    for _ in 0..20 {
        assert_eq!(client.request(&echo("{}")).await.unwrap().status(), 200);
    }
    // At most 8 of the 40 spans are queued.
    let full = ["reason=\"queue_full\""];
    eventually(SOON, || agent.count("penstock_trace_spans_dropped_total", &full) >= 32).await;
    let (metrics, begin) = (agent.agent.metrics(), Instant::now());
    drop((client, agent));
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    let text = metrics.encode();
    let dropped = text.lines().filter(|line| line.starts_with("penstock_trace_spans_dropped_total"));
    let dropped: u64 = dropped.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    assert_eq!(dropped, 42, "{text}");
}

/// D14.
#[tokio::test]
async fn refusing_collector_loses_only_spans() {
    let collector = Collector::start(CollectorBehaviour::Refuses).await.unwrap();
    let (_server, agent, mut client) = builtin(to(&collector)).await;
    for _ in 0..3 {
        assert_eq!(client.request(&echo("{}")).await.unwrap().status(), 200);
    }
    let dropped = || agent.count("penstock_trace_spans_dropped_total", &["reason=\"export_failed\""]);
    eventually(SOON, || dropped() == 6).await;
    assert_eq!(agent.count("penstock_trace_spans_exported_total", &[]), 0);
}

/// D14: spans queued at shutdown are sent.
#[tokio::test]
async fn queued_spans_are_sent_at_shutdown() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let configure = to(&collector);
    let (_server, agent, mut client) = builtin(|config| {
        configure(config);
        config.tracing.export_interval = Duration::from_secs(3600);
        config.tracing.service_name = "edge".to_owned();
    })
    .await;
    for _ in 0..5 {
        assert_eq!(client.request(&echo("{}")).await.unwrap().status(), 200);
    }
    assert!(collector.spans().is_empty());
    let metrics = agent.agent.metrics();
    drop((client, agent));
    let spans = collector.spans();
    assert_eq!((spans.len(), spans[0].resource["service.name"].as_str()), (10, "edge"));
    assert!(metrics.encode().contains("penstock_trace_spans_exported_total 10"));
}
