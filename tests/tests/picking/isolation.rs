//! No byte of one request reaches another: requests with distinct fields and bodies, across every `pick_per`, picker, steering
//! mode, retry, replica change, failure mode, and death of an endpoint that has read the request. An endpoint gets the client's
//! bytes or the picker's decision for that request.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use penstock_agent::config::{
    AppProtocol, BodyToPicker, FailureMode, ListenTls, PickPer, Picker, Pool, ResponseToPicker, SteeringMode,
};
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_tests::{
    Client, Http2Client, Http2Options, Http2Server, ModelServer, Random, Refusing, Request, Response, ScriptedEpp,
    TestAgent,
    agent::{builtin_pool, epps_pool},
    content::Fnv,
    eventually,
    model_server::{Echo, Options},
    scripted_epp::{
        Answer, Dynamo, Endpoints, Exchange, Fault, Faulty, Gie, Harm, LlmdRouter, Lwepp, Moment, Personality, Script,
        header, reply,
    },
    stage::json,
    tls::Certificate,
};
use tokio::{io::AsyncReadExt as _, net::TcpListener};
use tonic::Code;

use crate::SOON;

/// How a picker treats requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Builtin,
    /// Names the endpoints and echoes every field.
    Echo,
    /// Also sets a field that names the request.
    Field,
    /// Also replaces the body with one that names the request.
    Body,
    Llmd,
    Gie,
    Lwepp,
    Dynamo,
}

const STYLES: [Style; 8] =
    [Style::Builtin, Style::Echo, Style::Field, Style::Body, Style::Llmd, Style::Gie, Style::Lwepp, Style::Dynamo];

/// The fault of the case's first picker stream.
const FAULTS: [Option<Fault>; 7] = [
    None,
    Some(Fault::At(Moment::RequestHeaders, Harm::ResetConnection)),
    Some(Fault::At(Moment::RequestBody(1), Harm::Status(Code::Unavailable))),
    Some(Fault::At(Moment::HeaderReply, Harm::ResetConnection)),
    Some(Fault::At(Moment::HeaderReply, Harm::Status(Code::Internal))),
    Some(Fault::At(Moment::HeaderReply, Harm::Close)),
    Some(Fault::At(Moment::ResponseHeaders, Harm::ResetConnection)),
];

/// The text in every part of one request and in no other.
fn mark(case: u64, request: u64) -> String {
    format!("mark-{case}-{request}-end")
}

/// The replacement body of [`Style::Body`].
fn rewritten(mark: &str) -> Vec<u8> {
    json(&format!("rewritten-{mark}"), 400)
}

/// The picker for [`Style::Echo`], [`Style::Field`] and [`Style::Body`].
struct Deciding {
    style: Style,
    list: String,
}

impl Deciding {
    async fn decide(&self, exchange: &mut Exchange, has_body: bool) -> Answer {
        let own = header(&exchange.request_headers, "x-request-id").unwrap_or_default().to_owned();
        let decided = [("x-decided-for", own.as_str())];
        let fields: &[_] = if self.style == Style::Echo { &[] } else { &decided };
        exchange.send(reply::pick(&self.list, fields)).await?;
        if !has_body {
            return Ok(());
        }
        let body = match self.style {
            Style::Body => rewritten(&own),
            _ => exchange.request_body.clone(),
        };
        for message in reply::request_body(&Bytes::from(body)) {
            exchange.send(message).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Script for Deciding {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.decide(exchange, false).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream { self.decide(exchange, true).await } else { Ok(()) }
    }
}

async fn start(script: impl Script, fault: Option<Fault>) -> ScriptedEpp {
    match fault {
        Some(fault) => ScriptedEpp::start(Faulty::new(script, fault).times(1)).await.unwrap(),
        None => ScriptedEpp::start(script).await.unwrap(),
    }
}

async fn epp(style: Style, endpoints: &[SocketAddr], fault: Option<Fault>) -> ScriptedEpp {
    let all = || Endpoints::new(endpoints).offering(endpoints.len());
    match style {
        Style::Llmd => start(LlmdRouter::over(all()), fault).await,
        Style::Gie => start(Gie::over(all()), fault).await,
        Style::Lwepp => start(Lwepp::over(all()), fault).await,
        Style::Dynamo => start(Dynamo::over(all()), fault).await,
        _ => {
            let list: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
            start(Deciding { style, list: list.join(",") }, fault).await
        }
    }
}

/// The bodies that the endpoint may get for this one, including the client's.
fn bodies(style: Style, mark: &str, body: &[u8]) -> Vec<Vec<u8>> {
    let decided = match style {
        Style::Body => rewritten(mark),
        Style::Llmd => LlmdRouter::sent_on(body, None),
        Style::Gie => Gie::sent_on(body, None),
        Style::Dynamo => Dynamo::sent_on(body, None),
        Style::Builtin | Style::Echo | Style::Field | Style::Lwepp => body.to_vec(),
    };
    vec![body.to_vec(), decided]
}

/// An endpoint that reads the start of a request, then closes the connection.
struct Dying {
    addr: SocketAddr,
    /// The bytes received on each of its connections.
    taken: Arc<Mutex<Vec<String>>>,
}

impl Dying {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, taken) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
        let kept = Arc::clone(&taken);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut bytes = Vec::new();
                while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
                    if !matches!(stream.read_buf(&mut bytes).await, Ok(1..)) {
                        break;
                    }
                }
                if !bytes.is_empty() {
                    kept.lock().push(String::from_utf8_lossy(&bytes).into_owned());
                }
            }
        });
        Self { addr, taken }
    }
}

struct Case {
    number: u64,
    style: Style,
    pick_per: PickPer,
    fault: Option<Fault>,
    failure_mode: FailureMode,
    mode: SteeringMode,
    /// What the first endpoint of the list does.
    first: First,
    protocol: AppProtocol,
    body_to_picker: BodyToPicker,
    response_to_picker: ResponseToPicker,
}

/// What the cases of a run have used.
#[derive(Debug, Default)]
struct Used {
    leased: u64,
    pinned: u64,
    http2_endpoints: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Serves,
    RefusesConnections,
    DiesOfRequests,
}

impl Case {
    /// In any 24 cases in a row, each style occurs with each `pick_per`, and with each of three modes.
    fn new(number: u64, random: &mut Random, mode: SteeringMode) -> Self {
        let pick_per = [PickPer::Lease, PickPer::Connection, PickPer::Request][(number / 8 % 3) as usize];
        let first = [First::Serves, First::RefusesConnections, First::DiesOfRequests][(number / 3 % 3) as usize];
        // Only HTTP/1.1 connections are pinned, and the dying endpoint reads only HTTP/1.1.
        let both = pick_per != PickPer::Connection && first != First::DiesOfRequests;
        Self {
            number,
            style: STYLES[(number % STYLES.len() as u64) as usize],
            pick_per,
            fault: random.pick(&FAULTS),
            failure_mode: random.pick(&[FailureMode::Open, FailureMode::Closed]),
            mode,
            first,
            protocol: if both && number % 2 == 1 { AppProtocol::H2c } else { AppProtocol::Http1 },
            body_to_picker: random.pick(&[BodyToPicker::Whole, BodyToPicker::Abridged]),
            response_to_picker: random.pick(&[
                ResponseToPicker::Off,
                ResponseToPicker::Headers,
                ResponseToPicker::Usage,
                ResponseToPicker::Body,
            ]),
        }
    }

    fn name(&self) -> String {
        let Self { number, style, pick_per, fault, failure_mode, mode, first, protocol, .. } = self;
        let told = (self.body_to_picker, self.response_to_picker);
        format!(
            "case {number}: {style:?} {pick_per:?} {fault:?} {failure_mode:?} {mode:?} {first:?} {protocol:?} {told:?}"
        )
    }

    /// The `n`th request, with its mark in every field.
    fn request(&self, n: u64) -> (Request, Vec<u8>) {
        let mark = mark(self.number, n);
        let body = if n % 4 == 3 { Vec::new() } else { json(&mark, 100 + 40_000 * (n as usize % 2)) };
        let request = match n % 4 {
            3 => Request::get("/test/echo"),
            2 => Request::post("/test/echo", "").chunked(body.clone(), 1000),
            // PUT is idempotent.
            1 => Request::new("PUT", "/test/echo").body(body.clone()),
            _ => Request::post("/test/echo", body.clone()),
        };
        let request = request
            .header("content-type", "application/json")
            .header("x-request-id", mark.as_str())
            .header("authorization", format!("Bearer {mark}"))
            .header("cookie", format!("session={mark}"))
            .header(&format!("x-only-{mark}"), mark.as_str());
        // A field that only some requests have, to detect one that persists.
        let request =
            if n.is_multiple_of(2) { request.header("content-digest", format!("sha-256={mark}")) } else { request };
        (request, body)
    }

    /// Checks a response of the endpoint or, after a fault, of the agent.
    fn check(&self, n: u64, body: &[u8], response: &Response) {
        let own = mark(self.number, n);
        let name = self.name();
        let text = format!("{:?} {}", response.head, response.text());
        for other in text.split("mark-").skip(1) {
            assert!(format!("mark-{other}").starts_with(&own), "{name}: request {n} contains mark-{other:.20}");
        }
        if self.first == First::DiesOfRequests && response.status() == 502 {
            assert_eq!(response.error_code(), "endpoint_closed", "{name}: request {n}: {text}");
            assert!(matches!(n % 4, 0 | 2), "{name}: request {n} could have been executed again");
            return;
        }
        if response.status() != 200 {
            assert!(self.fault.is_some() && self.failure_mode == FailureMode::Closed, "{name}: request {n}: {text}");
            return;
        }
        let seen: Echo = response.json().unwrap();
        let has = |field: &str, value: String| assert_eq!(seen.header(field), Some(value.as_str()), "{name}: {n}");
        has("x-request-id", own.clone());
        has("authorization", format!("Bearer {own}"));
        has("cookie", format!("session={own}"));
        has(&format!("x-only-{own}"), own.clone());
        // The digest is sent only with the body that it describes.
        let digest = n.is_multiple_of(2) && seen.body_hash == Fnv::of(body).value();
        assert_eq!(seen.header("content-digest").is_some(), digest, "{name}: request {n}");
        let allowed: Vec<u64> = bodies(self.style, &own, body).iter().map(|body| Fnv::of(body).value()).collect();
        let bodiless = body.is_empty() && seen.body_length == 0;
        assert!(bodiless || allowed.contains(&seen.body_hash), "{name}: request {n} has another body");
        // A decision that changes a request applies to that request only, and each request has its own.
        if matches!(self.style, Style::Field | Style::Body) && self.fault.is_none() {
            has("x-decided-for", own.clone());
            assert!(bodiless || seen.body_hash == allowed[1], "{name}: request {n} lacks its own decision");
        }
    }

    fn pool(&self, endpoints: &[SocketAddr], epps: &[ScriptedEpp; 2]) -> Pool {
        let mut pool = match self.style {
            Style::Builtin => builtin_pool(endpoints),
            _ => epps_pool(endpoints, &[epps[0].addr, epps[1].addr], self.failure_mode),
        };
        (pool.pick_per, pool.app_protocol) = (self.pick_per, self.protocol);
        if let Picker::Epp(epp) = &mut pool.picker {
            (epp.body_to_picker, epp.response_to_picker) = (self.body_to_picker, self.response_to_picker);
            // The longer bodies are abridged.
            epp.body_to_picker_bytes = 1024;
        }
        pool
    }

    async fn run(&self, certificate: &Certificate, tls: &ListenTls) -> Used {
        let http1 = [server().await, server().await];
        let http2 = [http2_server().await, http2_server().await];
        let refusing = Refusing::new().unwrap();
        let mut endpoints = match self.protocol {
            AppProtocol::Http1 => vec![http1[0].addr, http1[1].addr],
            AppProtocol::H2c => vec![http2[0].addr, http2[1].addr],
            AppProtocol::Https => unreachable!("no test of this file uses TLS"),
        };
        let dying = Dying::start().await;
        match self.first {
            First::Serves => {}
            First::RefusesConnections => endpoints.insert(0, refusing.addr),
            First::DiesOfRequests => endpoints.insert(0, dying.addr),
        }
        // The second replica is asked if the first fails.
        let epps = [epp(self.style, &endpoints, self.fault).await, epp(self.style, &endpoints, None).await];
        let pool = self.pool(&endpoints, &epps);
        let agent = TestAgent::start(pool, self.mode, |config| {
            config.listen.workers = 1;
            config.listen.tls = Some(tls.clone());
        });
        let mut clients = [Client::connect(agent.addr).await.unwrap(), Client::connect(agent.addr).await.unwrap()];
        for n in 0..10 {
            let (request, body) = self.request(n);
            // Two in a row on one connection, then two on the other.
            let client = &mut clients[(n / 2 % 2) as usize];
            let response = client.request(&request).await.unwrap_or_else(|error| panic!("{}: {error:#}", self.name()));
            self.check(n, &body, &response);
            if response.header("connection") == Some("close") {
                *client = Client::connect(agent.addr).await.unwrap();
            }
        }
        let mut client = Http2Client::connect(agent.addr).await.unwrap();
        for n in 10..13 {
            let (request, body) = self.request(n);
            self.check(n, &body, &client.request(&request).await.unwrap());
        }
        let addr = agent.agent.tls_address().unwrap();
        for n in 13..17 {
            let (request, body) = self.request(n);
            let tls = certificate.connect(addr, &["http/1.1"]).await.unwrap();
            let mut client = Client::over(tls, addr);
            let response = client.request(&request).await.unwrap_or_else(|error| panic!("{}: {error:#}", self.name()));
            self.check(n, &body, &response);
        }
        self.check_dying(&dying);
        self.check_epps(&epps);
        drop(clients);
        eventually(SOON, || agent.metric("penstock_pinned_connections", &[]) == 0.0).await;
        Used {
            leased: agent.count("penstock_leased_requests_total", &[]),
            pinned: agent.count("penstock_pins_ended_total", &[]),
            http2_endpoints: http2.iter().map(Http2Server::requests).sum(),
        }
    }

    fn check_dying(&self, dying: &Dying) {
        // Each connection that the dying endpoint closed carried one request, once.
        let taken = dying.taken.lock().clone();
        for request in &taken {
            let own = request.split("mark-").nth(1).unwrap_or_else(|| panic!("{}: {request}", self.name()));
            let own = &own[..own.find("-end").expect("the mark has no end")];
            for other in request.split("mark-").skip(1) {
                // The last mark may be truncated.
                let whole = format!("{own}-end");
                let same = other.starts_with(&whole) || whole.starts_with(other);
                assert!(same, "{}: {own} and mark-{other:.20}", self.name());
            }
            let again = taken.iter().filter(|other| other.contains(&format!("mark-{own}-end"))).count();
            assert!(again == 1 || !request.starts_with("POST "), "{}: {own} was taken {again} times", self.name());
        }
    }

    fn check_epps(&self, epps: &[ScriptedEpp]) {
        // A picker stream concerns one request.
        for stream in epps.iter().flat_map(ScriptedEpp::streams) {
            let (fields, body) = (stream.request_headers(), stream.request_body().0);
            let own = header(&fields, "x-request-id").unwrap_or_default().to_owned();
            let said = format!("{fields:?} {}", String::from_utf8_lossy(&body));
            for other in said.split("mark-").skip(1) {
                assert!(
                    format!("mark-{other}").starts_with(&own),
                    "{}: a stream for {own} contains mark-{other:.20}",
                    self.name()
                );
            }
        }
    }
}

async fn server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

async fn http2_server() -> Http2Server {
    Http2Server::start(Http2Options::default()).await.unwrap()
}

/// A certificate, a listener's setting with it, and the folder of its files.
fn tls() -> (Certificate, ListenTls, tempfile::TempDir) {
    let certificate = Certificate::new("agent.example").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
    let listen =
        ListenTls { address: SocketAddr::from(([127, 0, 0, 1], 0)), cert_file, key_file, ..ListenTls::default() };
    (certificate, listen, folder)
}

async fn run(cases: std::ops::Range<u64>, modes: &[SteeringMode]) {
    let seed = Random::fresh_seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (certificate, listen, _folder) = tls();
    let mut used = Used::default();
    for number in cases {
        let mode = modes[(number % modes.len() as u64) as usize];
        let case = Case::new(number, &mut random, mode).run(&certificate, &listen).await;
        used.leased += case.leased;
        used.pinned += case.pinned;
        used.http2_endpoints += case.http2_endpoints;
    }
    // Otherwise the run has shown nothing about them.
    assert!(used.leased > 0 && used.pinned > 0 && used.http2_endpoints > 0, "{used:?}");
}

#[tokio::test]
async fn relayed_requests_share_no_byte() {
    run(0..48, &[SteeringMode::Off]).await;
}

#[tokio::test]
async fn steered_requests_share_no_byte() {
    run(96..120, &[SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto]).await;
}

/// A regression test: a lease, pickers that echo, and three clients of one connection.
#[tokio::test]
async fn leased_requests_keep_their_own_fields() {
    for style in [Style::Echo, Style::Llmd] {
        let case = Case {
            number: 1,
            style,
            pick_per: PickPer::Lease,
            fault: None,
            failure_mode: FailureMode::Closed,
            mode: SteeringMode::Off,
            first: First::Serves,
            protocol: AppProtocol::Http1,
            body_to_picker: BodyToPicker::Whole,
            response_to_picker: ResponseToPicker::Usage,
        };
        let (certificate, listen, _folder) = tls();
        let used = case.run(&certificate, &listen).await;
        assert!(used.leased > 0, "{style:?}: {used:?}");
    }
}
