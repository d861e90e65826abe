//! Dynamic metadata of an EPP's replies: in the access log and the span under the EPP's names, and counted for billing, on every
//! path and in every phase of the exchange.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use penstock_agent::config::Attribute;
use penstock_proto::{
    ext_proc::{HttpBody, HttpHeaders, ProcessingResponse},
    prost_types::{Struct, Value, value::Kind},
};
use penstock_tests::{
    BodyEnd, Client, Collector, CollectorBehaviour, ModelServer, Plan, Request, Stage,
    agent_process::AgentProcess,
    client::Pace,
    eventually,
    http2_client::Http2Client,
    model_server::{Framing, Lengths, Options, Pauses},
    scripted_epp::{Answer, Answering, End, EvictAfter, Evicting, Exchange, Script, ScriptedEpp, header, reply},
    stage::{echo, epp, json},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::SOON;

const COUNTER: &str = "penstock_epp_attributes_total";

fn of(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn number(number: f64) -> Value {
    of(Kind::NumberValue(number))
}

fn text(text: &str) -> Value {
    of(Kind::StringValue(text.to_owned()))
}

/// The reply with these values in addition, each with its namespace and key.
fn with(mut reply: ProcessingResponse, values: &[(&str, &str, Value)]) -> ProcessingResponse {
    let metadata = reply.dynamic_metadata.get_or_insert_default();
    for (namespace, key, value) in values {
        let namespace =
            metadata.fields.entry((*namespace).to_owned()).or_insert_with(|| of(Kind::StructValue(Struct::default())));
        let Some(Kind::StructValue(within)) = &mut namespace.kind else { panic!("{namespace:?}") };
        within.fields.insert((*key).to_owned(), value.clone());
    }
    reply
}

/// Reports something with every reply. The last one has the cost that the request names.
struct Reporting {
    endpoint: SocketAddr,
}

impl Reporting {
    fn phase(name: &'static str) -> [(&'static str, &'static str, Value); 2] {
        [("phases", name, number(1.0)), ("phases", "last", text(name))]
    }

    async fn answer(&self, exchange: &mut Exchange, has_body: bool) -> Answer {
        let head = reply::pick(&self.endpoint.to_string(), &[]);
        // Wrong at this point.
        let values = [Self::phase("request_head").to_vec(), vec![("envoy.lb", "cost", number(1000.0))]].concat();
        exchange.send(with(head, &values)).await?;
        if has_body {
            exchange.send(with(reply::request_body_unchanged(), &Self::phase("request_body"))).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Script for Reporting {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.answer(exchange, false).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream { self.answer(exchange, true).await } else { Ok(()) }
    }

    async fn response_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        exchange.send(with(reply::response_headers(&[]), &Self::phase("response_head"))).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        let cost = header(&exchange.request_headers, "x-cost").map(|cost| cost.parse::<f64>().unwrap());
        let mut values = Self::phase("response_body").to_vec();
        if body.end_of_stream {
            // By then the client has long got its response.
            tokio::time::sleep(Duration::from_millis(20)).await;
            values.push(("envoy.lb", "cost", number(cost.unwrap())));
            values.push(("tenant", "name", text(header(&exchange.request_headers, "x-tenant").unwrap())));
        }
        exchange.send(with(reply::response_body_unchanged(), &values)).await
    }
}

/// A stream that is steered where that is possible.
fn stream() -> Plan {
    Plan {
        headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
        framing: Framing::Chunked,
        size: 20_000,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 7, every: 1, up_to_us: 2000 }),
        ..Plan::default()
    }
}

fn billed(n: usize) -> Request {
    planned(n, &stream())
}

/// A request with this response, and what the picker is to say about it.
fn planned(n: usize, plan: &Plan) -> Request {
    let body = json!({"model": "m", "stream": true, "prompt": "x"}).to_string();
    Request::post("/test/body", body)
        .header("content-type", "application/json")
        .header("x-test-plan", plan.header())
        .header("x-request-id", format!("id-{n}"))
        .header("x-tenant", format!("tenant-{n}"))
        .header("x-cost", format!("{n}.5"))
}

fn agent_text(endpoint: SocketAddr, epp: SocketAddr, mode: &str, pool: &str, picker: &str) -> String {
    format!(
        "[listen]\naddress = \"127.0.0.1:0\"\nworkers = 2\n[admin]\naddress = \"127.0.0.1:0\"\n\
         [timeouts]\nlame_duck = \"off\"\n[steering]\nmode = \"{mode}\"\nmax_flows = 1024\n[bbr]\nenabled = true\n\
         [[pools]]\nname = \"default\"\nendpoints = [\"{endpoint}\"]\n{pool}\n\
         [pools.picker]\nkind = \"epp\"\naddress = \"{epp}\"\nconnect_timeout = \"10s\"\nhealth_interval = \"off\"\n{picker}\n\
         [pools.picker.metadata]\ncounters = [\"envoy.lb/cost\"]\n"
    )
}

/// The access log's line of the request.
async fn line(agent: &mut AgentProcess, n: usize) -> serde_json::Value {
    let id = format!("\"request_id\":\"id-{n}\"");
    serde_json::from_str(&agent.process.line(&id, SOON).await.unwrap()).unwrap()
}

fn metadata(line: &serde_json::Value) -> serde_json::Value {
    line["metadata"].as_str().map_or(serde_json::Value::Null, |text| serde_json::from_str(text).unwrap())
}

/// What every reply to this request said.
fn expected(n: usize) -> serde_json::Value {
    json!({
        "envoy.lb": {"cost": n as f64 + 0.5},
        "phases": {"request_head": 1, "request_body": 1, "response_head": 1, "response_body": 1, "last": "response_body"},
        "tenant": {"name": format!("tenant-{n}")},
    })
}

#[tokio::test]
async fn metadata_of_every_phase_reaches_log_and_counter_on_every_path() {
    for (mode, told) in [
        ("off", "usage"),
        ("ingress", "usage"),
        ("local", "usage"),
        ("auto", "usage"),
        ("off", "body"),
        ("auto", "headers"),
    ] {
        let endpoint = ModelServer::start(Options::default()).await.unwrap();
        let epp = ScriptedEpp::start(Reporting { endpoint: endpoint.addr }).await.unwrap();
        let told = format!("response_to_picker = \"{told}\"");
        let text = agent_text(endpoint.addr, epp.addr, mode, "", &told);
        let mut agent = AgentProcess::start_logging(&text).await.unwrap();
        let mut client = Client::connect(agent.addr).await.unwrap();
        // One after the other on the same connections.
        let (mut steered, mut sum) = (0, 0.0);
        for n in 0..6 {
            let response = client.request(&billed(n)).await.unwrap();
            assert_eq!((response.status(), response.read.end), (200, BodyEnd::Complete));
            let line = line(&mut agent, n).await;
            assert_eq!(metadata(&line), expected(n), "{mode} {told}: {line}");
            assert_eq!((line["reason"].as_str(), line["status"].as_u64()), (Some("ok"), Some(200)));
            steered += line["bytes_kernel"].as_u64().unwrap();
            sum += n as f64 + 0.5;
            // Added once, and before the line is written.
            let labels = ["pool=\"default\"", "gen_ai_request_model=\"m\"", "attribute=\"envoy.lb/cost\""];
            assert_eq!(agent.metric(COUNTER, &labels).await.unwrap(), sum, "{mode} {told}");
        }
        assert_eq!(steered > 0, mode != "off", "{mode} {told}");
        assert_eq!(agent.metric("penstock_epp_metadata_dropped_total", &[]).await.unwrap(), 0.0);
    }
}

/// A leased request, and what follows on a pinned connection, ask nobody: nothing is booked to them.
#[tokio::test]
async fn metadata_of_an_earlier_request_is_not_booked_to_a_later_one() {
    for pick_per in ["lease", "connection", "request"] {
        let endpoint = ModelServer::start(Options::default()).await.unwrap();
        let epp = ScriptedEpp::start(Reporting { endpoint: endpoint.addr }).await.unwrap();
        let pool = format!("pick_per = \"{pick_per}\"");
        let text = agent_text(endpoint.addr, epp.addr, "auto", &pool, "");
        let mut agent = AgentProcess::start_logging(&text).await.unwrap();
        let mut client = Client::connect(agent.addr).await.unwrap();
        for n in 1..4 {
            assert_eq!(client.request(&billed(n)).await.unwrap().status(), 200);
        }
        let asked = if pick_per == "request" { 1..4 } else { 1..2 };
        for n in asked.clone() {
            assert_eq!(metadata(&line(&mut agent, n).await), expected(n), "{pick_per}");
        }
        if pick_per == "lease" {
            for n in 2..4 {
                assert_eq!(metadata(&line(&mut agent, n).await), serde_json::Value::Null);
            }
        }
        let sum: f64 = asked.map(|n| n as f64 + 0.5).sum();
        assert_eq!(agent.metric(COUNTER, &[]).await.unwrap(), sum, "{pick_per}");
    }
}

#[tokio::test]
async fn metadata_of_requests_over_http2_is_booked_to_each() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let epp = ScriptedEpp::start(Reporting { endpoint: endpoint.addr }).await.unwrap();
    let text = agent_text(endpoint.addr, epp.addr, "auto", "", "");
    let mut agent = AgentProcess::start_logging(&text).await.unwrap();
    let mut client = Http2Client::connect(agent.addr).await.unwrap();
    let mut streams = Vec::new();
    // As many as the connection's window has room for, because they are read one after the other.
    for n in 0..3 {
        streams.push(client.send(&billed(n)).await.unwrap());
    }
    for mut stream in streams {
        assert_eq!(stream.response().await.unwrap().status(), 200);
    }
    for n in 0..3 {
        assert_eq!(metadata(&line(&mut agent, n).await), expected(n));
    }
    assert_eq!(agent.metric(COUNTER, &[]).await.unwrap(), 4.5);
}

/// The reason's detail, and the metadata of an immediate reply.
#[tokio::test]
async fn metadata_and_reason_of_immediate_reply_reach_log() {
    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let why = [("X-LLM-D-Request-Dropped-Reason", "rejected-saturated")];
    let script =
        Answering::new(move |_| vec![with(reply::immediate(429, &why, "later"), &[("envoy.lb", "cost", number(2.0))])]);
    let epp = ScriptedEpp::start(script).await.unwrap();
    let mut agent = AgentProcess::start_logging(&agent_text(endpoint.addr, epp.addr, "off", "", "")).await.unwrap();
    let response = Client::connect(agent.addr).await.unwrap().request(&billed(1)).await.unwrap();
    assert_eq!(response.status(), 429);
    let line = line(&mut agent, 1).await;
    assert_eq!(
        (line["reason"].as_str(), line["reason_detail"].as_str()),
        (Some("picker_reply"), Some("rejected-saturated"))
    );
    assert_eq!(metadata(&line), json!({"envoy.lb": {"cost": 2}}));
    assert_eq!(agent.metric(COUNTER, &[]).await.unwrap(), 2.0);
}

/// In the middle of a response, which may be steered.
#[tokio::test]
async fn reason_of_eviction_reaches_log_on_every_path() {
    for mode in ["off", "ingress", "local", "auto"] {
        let endpoint = ModelServer::start(Options::default()).await.unwrap();
        let now = Arc::new(Notify::new());
        let inner = Reporting { endpoint: endpoint.addr };
        let script = Evicting { inner, after: EvictAfter::ResponseHead, now: Arc::clone(&now) };
        let epp = ScriptedEpp::start(script).await.unwrap();
        let text = agent_text(endpoint.addr, epp.addr, mode, "", "");
        let mut agent = AgentProcess::start_logging(&text).await.unwrap();
        let mut client = Client::connect(agent.addr).await.unwrap();
        let plan = Plan { size: 1 << 30, ..stream() };
        client.send(&planned(1, &plan)).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        now.notify_one();
        let mut checker = plan.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_ne!(read.end, BodyEnd::Complete, "{mode}");
        let line = line(&mut agent, 1).await;
        assert_eq!((line["reason"].as_str(), line["reason_detail"].as_str()), (Some("evicted"), Some("evicted")));
        assert_eq!(line["status"].as_u64(), Some(200), "{mode}");
        assert_eq!(metadata(&line)["phases"]["response_head"], 1, "{mode}: {line}");
    }
}

/// An EPP that says too much, or something that cannot be billed.
#[tokio::test]
async fn metadata_is_bounded_and_wrong_numbers_are_refused() {
    let values = vec![
        ("n", "a", number(f64::NAN)),
        ("n", "b", number(-1.0)),
        ("n", "c", text("7")),
        ("n", "d", text(&"x".repeat(10_000))),
        ("n", "e", number(7.0)),
    ];
    let mut stage = Stage::with(
        move |all| {
            let one = all[0].to_string();
            Answering::new(move |_| vec![with(reply::pick(&one, &[]), &values)])
        },
        |config| {
            let counter = |key: &str| Attribute { namespace: "n".into(), key: key.into() };
            epp(config).metadata.counters = ["a", "b", "c", "e", "missing"].map(counter).into();
            epp(config).metadata.log_entries = 2;
        },
    )
    .await;
    assert_eq!(stage.request(&echo(json("m", 100))).await.status(), 200);
    let agent = &stage.agent;
    eventually(SOON, || agent.metric(COUNTER, &["attribute=\"n/e\""]) == 7.0).await;
    assert_eq!(agent.metric(COUNTER, &[]), 7.0);
    for reason in ["not_finite", "negative", "not_a_number"] {
        let labels = [format!("reason=\"{reason}\"")];
        assert_eq!(agent.metric("penstock_epp_attributes_refused_total", &[&labels[0]]), 1.0, "{reason}");
    }
    // Which two of the short ones are kept is open; the long one is dropped for either reason.
    assert_eq!(agent.metric("penstock_epp_metadata_dropped_total", &[]), 3.0);
}

#[tokio::test]
async fn metadata_is_on_the_span_with_its_types() {
    let collector = Collector::start(CollectorBehaviour::Keeps).await.unwrap();
    let url = collector.url();
    let mut stage = Stage::with(
        |all| Reporting { endpoint: all[0] },
        move |config| {
            config.tracing.otlp_endpoint = Some(url);
            config.tracing.export_interval = Duration::from_millis(5);
        },
    )
    .await;
    assert_eq!(stage.request(&billed(3)).await.status(), 200);
    eventually(SOON, || collector.spans().len() >= 2).await;
    let spans = collector.spans();
    let server = spans.iter().find(|span| span.name != "pick").unwrap();
    let wanted = BTreeMap::from([
        ("penstock.metadata.envoy.lb.cost", "3.5"),
        ("penstock.metadata.phases.last", "response_body"),
        ("penstock.metadata.tenant.name", "tenant-3"),
        ("penstock.reason_detail", ""),
    ]);
    for (name, value) in wanted {
        assert_eq!(server.get(name), value, "{name}");
    }
}

/// The stream ends without a reply to the last message: what came before is written.
#[tokio::test]
async fn metadata_before_the_picker_closes_is_kept() {
    struct Leaving(Reporting);

    #[tonic::async_trait]
    impl Script for Leaving {
        async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
            self.0.request_headers(exchange, headers).await
        }

        async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
            self.0.request_body(exchange, body).await?;
            if body.end_of_stream { Err(End::Close) } else { Ok(()) }
        }
    }

    let endpoint = ModelServer::start(Options::default()).await.unwrap();
    let epp = ScriptedEpp::start(Leaving(Reporting { endpoint: endpoint.addr })).await.unwrap();
    let mut agent = AgentProcess::start_logging(&agent_text(endpoint.addr, epp.addr, "off", "", "")).await.unwrap();
    let response = Client::connect(agent.addr).await.unwrap().request(&billed(1)).await.unwrap();
    assert_eq!(response.status(), 200);
    let phases = json!({"request_head": 1, "request_body": 1, "last": "request_body"});
    assert_eq!(metadata(&line(&mut agent, 1).await), json!({"envoy.lb": {"cost": 1000}, "phases": phases}));
}
