//! Every response arrives byte for byte on every path, for every framing, size, write pattern and reading speed.

use std::time::Duration;

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Client, Collector, CollectorBehaviour, ModelServer, Plan, Random, Reader, Request,
    agent::{TestAgent, builtin_pool},
    client::Head,
    eventually,
    model_server::{After, Fault, FaultKind, Framing, HeadWrites, Lengths, Options, Pauses},
};

const SOON: Duration = Duration::from_secs(10);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Runs each scenario on each path.
macro_rules! on_every_path {
    ($($scenario:ident)+) => {
        mod off { $(#[tokio::test] async fn $scenario() { super::$scenario(super::SteeringMode::Off).await; })+ }
        mod ingress { $(#[tokio::test] async fn $scenario() { super::$scenario(super::SteeringMode::Ingress).await; })+ }
        mod local { $(#[tokio::test] async fn $scenario() { super::$scenario(super::SteeringMode::Local).await; })+ }
        mod auto { $(#[tokio::test] async fn $scenario() { super::$scenario(super::SteeringMode::Auto).await; })+ }
    };
}

on_every_path! {
    any_framing_size_and_write_pattern_is_exact
    bytes_after_pause_are_steered
    single_byte_writes_are_exact
    large_bodies_are_exact
    slow_and_stalled_clients_get_every_byte
    last_bytes_with_fin_are_delivered
    client_stalled_before_orderly_close_gets_every_byte
    http10_clients_get_chunks_decoded
}

/// One response, and how the client requests and reads it.
#[derive(Debug)]
struct Case {
    plan: Plan,
    head_only: bool,
    reader: Reader,
}

impl Case {
    fn new(framing: Framing, size: u64, random: &mut Random) -> Self {
        let (chunked, seed) = (framing == Framing::Chunked, random.below(u64::MAX));
        let plan = Plan {
            framing,
            size,
            stream_id: seed,
            chunks: Lengths::Random { seed, max: 1 + size.max(20) / 20 },
            chunk_extension: chunked.then(|| "name=\"a value\";flag".to_owned()),
            trailers: if chunked { vec![("x-sum".to_owned(), "1".to_owned())] } else { Vec::new() },
            ..Plan::default()
        };
        Self { plan, head_only: false, reader: Reader::Fast }
    }

    /// Writes in random pieces with random pauses.
    fn in_pieces(mut self, random: &mut Random) -> Self {
        let (seed, max) = (random.below(u64::MAX), 1 + self.plan.size / 10);
        self.plan.writes = Lengths::Random { seed, max };
        self.plan.pauses = Some(Pauses { seed, every: 1 + random.below(3), up_to_us: 2000 });
        self
    }

    fn with_head(mut self, with_body: bool) -> Self {
        self.plan.head = HeadWrites { with_body, pause_us: 500, ..HeadWrites::default() };
        self
    }

    fn read_by(mut self, reader: Reader) -> Self {
        self.reader = reader;
        self
    }

    fn request(&self) -> Request {
        let method = if self.head_only { "HEAD" } else { "GET" };
        Request::new(method, "/test/body").header("x-test-plan", self.plan.header())
    }

    /// Pauses in the middle, so that the flow is armed when the rest arrives.
    fn with_a_pause(mut self) -> Self {
        self.plan.fault = Some(Fault { after: self.plan.size / 2, kind: FaultKind::StallMs(100) });
        self
    }

    /// Whether part of it is steered: always (true), never (false), or depending on timing (None).
    fn steered(&self, mode: SteeringMode) -> Option<bool> {
        let plan = &self.plan;
        let bodiless = self.head_only || plan.framing == Framing::None;
        let small = plan.framing == Framing::ContentLength && plan.size <= 16 * KIB;
        let empty = plan.size == 0 && plan.framing != Framing::Chunked;
        if mode == SteeringMode::Off || bodiless || empty {
            return Some(false);
        }
        if small && mode == SteeringMode::Auto {
            // Bytes that arrive with the head do not count.
            return (plan.size < 16 * KIB).then_some(false);
        }
        // A message program sees the chunks of a write only up to the end of one contiguous piece of kernel memory.
        let unseen = plan.framing == Framing::Chunked && mode != SteeringMode::Ingress;
        // Bytes that arrive with the end of the stream go through user space, which may be all of a short remainder.
        let with_end = plan.framing == Framing::UntilClose && plan.size <= 16 * KIB && mode != SteeringMode::Local;
        (plan.fault.is_some() && !unseen && !with_end).then_some(true)
    }
}

/// A server, an agent and counts of what has been exchanged.
struct Rig {
    mode: SteeringMode,
    server: ModelServer,
    agent: TestAgent,
    responses: u64,
    wire: u64,
    steered: u64,
}

impl Rig {
    async fn start(mode: SteeringMode) -> Self {
        let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |config| {
            // One worker, so that every request uses the same pool of endpoint connections.
            config.listen.workers = 1;
            config.timeouts.endpoint_keep_alive = Duration::from_secs(60);
        });
        Self { mode, server, agent, responses: 0, wire: 0, steered: 0 }
    }

    /// Exchanges and compares one response; the agent's counters must add up.
    async fn exchange(&mut self, client: &mut Client, case: &Case) -> Head {
        let what = format!("{:?} {case:?}", self.mode);
        client.send(&case.request()).await.unwrap();
        let head = client.head().await.unwrap_or_else(|error| panic!("{error:#}: {what}"));
        assert_eq!(head.status, case.plan.status, "{what}");
        let mut checker = case.plan.checker();
        let read = case.reader.take(client, &mut checker).await.unwrap_or_else(|error| panic!("{error:#}: {what}"));
        let size = if case.head_only { 0 } else { case.plan.size };
        assert_eq!((read.end, read.len), (BodyEnd::Complete, size), "{what}");
        if !case.head_only {
            assert_eq!(read.trailers, case.plan.trailers, "{what}");
        }
        self.responses += 1;
        self.wire += read.wire;
        let steered = self.counted_steered().await - self.steered;
        self.steered += steered;
        match case.steered(self.mode) {
            Some(true) => assert!(steered > 0, "no byte was steered: {what}"),
            Some(false) => assert_eq!(steered, 0, "steered: {what}"),
            None => {}
        }
        head
    }

    /// Bytes steered so far, after all responses are counted.
    async fn counted_steered(&self) -> u64 {
        let count = |name, labels: &[&str]| self.agent.count(name, labels);
        eventually(SOON, || count("penstock_requests_total", &[]) == self.responses).await;
        let steered = self.agent.steered();
        let relayed = count("penstock_body_bytes_total", &[r#"path="relay""#]);
        assert_eq!(steered + relayed, self.wire, "steered {steered}, relayed {relayed}");
        assert_eq!(count("penstock_flows_total", &[]), self.responses);
        steered
    }

    /// Exchanges one response on a new connection.
    async fn alone(&mut self, case: &Case, rcvbuf: Option<usize>) {
        let mut client = Client::connect_with(self.agent.addr, rcvbuf).await.unwrap();
        self.exchange(&mut client, case).await;
    }

    fn report(&self, seed: u64) {
        let stops: Vec<String> = ["refused", "framing", "room", "target", "fin", "behind", "account"]
            .map(|reason| (reason, self.agent.count("penstock_steer_stops_total", &[&format!("\"{reason}\"")])))
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let Self { mode, responses, wire, steered, .. } = self;
        println!("{mode:?} seed {seed}: {responses} responses, {wire} bytes, {steered} steered; stops: {stops:?}");
    }

    fn stops(&self, reason: &str) -> u64 {
        self.agent.count("penstock_steer_stops_total", &[&format!("reason=\"{reason}\"")])
    }
}

fn random(seed: u64) -> Random {
    println!("seed {seed}");
    Random::new(seed)
}

const FRAMED: [Framing; 2] = [Framing::ContentLength, Framing::Chunked];
const ALL: [Framing; 3] = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];

async fn any_framing_size_and_write_pattern_is_exact(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    let mut kept = Client::connect(rig.agent.addr).await.unwrap();
    let mut count = 0;
    for size in [0, 1, 100, 16 * KIB, MIB] {
        for with_body in [false, true] {
            for framing in FRAMED {
                let whole = Case::new(framing, size, &mut random).with_head(with_body);
                let pieces = Case::new(framing, size, &mut random).with_head(with_body).in_pieces(&mut random);
                let to_head = Case { head_only: true, ..Case::new(framing, size, &mut random) };
                let none = Plan { status: 204, framing: Framing::None, ..Plan::default() };
                let none = Case { plan: none, head_only: false, reader: Reader::Fast };
                for case in [whole, pieces, to_head, none] {
                    let head = rig.exchange(&mut kept, &case).await;
                    count += 1;
                    assert_eq!(head.header("x-request-count"), Some(count.to_string().as_str()), "{case:?}");
                }
            }
        }
    }
    // Every response used the same endpoint connection and client connection.
    assert_eq!((rig.server.connections_accepted(), rig.server.requests()), (1, count));
    for size in [0, 1, 100, 16 * KIB, MIB] {
        for with_body in [false, true] {
            let case = Case::new(Framing::UntilClose, size, &mut random).with_head(with_body);
            rig.alone(&case, None).await;
            rig.alone(&case.in_pieces(&mut random), None).await;
        }
    }
    let many_chunks = Case::new(Framing::Chunked, 100 * KIB, &mut random);
    let plan = Plan { chunks: Lengths::OneByte, chunk_extension: None, ..many_chunks.plan };
    rig.alone(&Case { plan, ..many_chunks }, None).await;
    rig.report(seed);
}

async fn bytes_after_pause_are_steered(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    for framing in ALL {
        for size in [100, 16 * KIB, MIB] {
            for with_body in [false, true] {
                rig.alone(&Case::new(framing, size, &mut random).with_head(with_body).with_a_pause(), None).await;
            }
        }
    }
    rig.report(seed);
}

async fn single_byte_writes_are_exact(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    for framing in ALL {
        for size in [1, 100, 2000] {
            let mut case = Case::new(framing, size, &mut random).with_head(size == 100);
            case.plan.writes = Lengths::OneByte;
            case.plan.pauses = Some(Pauses { seed, every: 10, up_to_us: 1000 });
            rig.alone(&case, None).await;
        }
    }
    if mode != SteeringMode::Off && mode != SteeringMode::Auto {
        assert!(rig.steered > 0);
    }
    rig.report(seed);
}

async fn large_bodies_are_exact(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    for framing in ALL {
        rig.alone(&Case::new(framing, 64 * MIB, &mut random), None).await;
    }
    rig.report(seed);
}

async fn slow_and_stalled_clients_get_every_byte(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    let slow = Reader::Slow { bytes: 8192, tick: Duration::from_millis(1) };
    let stalled = Reader::Stalled { after: 100_000, pause: Duration::from_millis(300) };
    for framing in ALL {
        rig.alone(&Case::new(framing, 2 * MIB, &mut random).read_by(slow), Some(8192)).await;
        rig.alone(&Case::new(framing, 16 * MIB, &mut random).read_by(stalled), Some(16384)).await;
        rig.alone(&Case::new(framing, 8 * MIB, &mut random).in_pieces(&mut random).read_by(stalled), None).await;
    }
    if mode != SteeringMode::Off {
        assert!(rig.stops("room") > 0, "the room gate did not trip");
    }
    rig.report(seed);
}

/// The FIN arrives in the last data segment, or right after it.
async fn last_bytes_with_fin_are_delivered(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    for cork in [true, false] {
        for size in [1, 100, 1000, 16 * KIB, 60_000, 100_000, MIB] {
            for with_body in [true, false] {
                let mut case = Case::new(Framing::UntilClose, size, &mut random).with_head(with_body);
                case.plan.cork = cork;
                rig.alone(&case, None).await;
                case.plan.stream_id += 1;
                case.plan.pauses = Some(Pauses { seed, every: 1, up_to_us: 3000 });
                case.plan.writes = Lengths::Random { seed, max: 1 + size / 3 };
                rig.alone(&case, Some(4096)).await;
            }
        }
    }
    // A framed message is complete whatever follows it.
    for framing in FRAMED {
        let mut case = Case::new(framing, 20_000, &mut random);
        (case.plan.cork, case.plan.after) = (true, After::SilentClose);
        rig.alone(&case, None).await;
    }
    rig.report(seed);
}

/// The client stalls for longer than the agent lingers; the kernel delivers what is queued then.
async fn client_stalled_before_orderly_close_gets_every_byte(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    let stalled = Reader::Stalled { after: 1, pause: Duration::from_millis(2500) };
    for framing in ALL {
        for size in [300 * KIB, 3 * MIB] {
            let mut case = Case::new(framing, size, &mut random).in_pieces(&mut random).read_by(stalled);
            case.plan.after = After::Close;
            case.plan.writes = Lengths::Fixed(10_000);
            case.plan.pauses = Some(Pauses { seed, every: 5, up_to_us: 500 });
            let mut client = Client::connect_with(rig.agent.addr, Some(4096)).await.unwrap();
            rig.exchange(&mut client, &case).await;
        }
    }
    rig.report(seed);
}

/// User space decodes chunks on every path.
async fn http10_clients_get_chunks_decoded(mode: SteeringMode) {
    let seed = Random::fresh_seed();
    let (mut random, mut rig) = (random(seed), Rig::start(mode).await);
    let case = Case::new(Framing::Chunked, MIB, &mut random).in_pieces(&mut random);
    let mut client = Client::connect(rig.agent.addr).await.unwrap();
    let plan = case.plan.header();
    client.send_raw(format!("GET /test/body HTTP/1.0\r\nx-test-plan: {plan}\r\n\r\n").as_bytes()).await.unwrap();
    let head = client.head().await.unwrap();
    assert_eq!((head.header("transfer-encoding"), head.header("content-length")), (None, None));
    let read = case.reader.take(&mut client, &mut case.plan.checker()).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, MIB));
    eventually(SOON, || rig.agent.count("penstock_requests_total", &[]) == 1).await;
    assert_eq!(rig.agent.steered(), 0);
    rig.responses = 1;
    rig.report(seed);
}

/// D14: the span names the path of the body and the time of its first byte, which precedes its last.
#[tokio::test]
async fn span_reports_steered_bytes() {
    let (collector, server) = (
        Collector::start(CollectorBehaviour::Keeps).await.unwrap(),
        ModelServer::start(Options::default()).await.unwrap(),
    );
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Ingress, |config| {
        config.tracing.otlp_endpoint = Some(collector.url());
        config.tracing.export_interval = Duration::from_millis(5);
    });
    let fault = Some(Fault { after: 50_000, kind: FaultKind::StallMs(400) });
    let plan = Plan { framing: Framing::Chunked, size: 100_000, fault, ..Plan::default() };
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&plan.request()).await.unwrap();
    plan.checker().feed(&response.body).unwrap();
    eventually(SOON, || collector.spans().len() == 2).await;
    let spans = collector.spans();
    let span = spans.iter().find(|span| span.name == "GET").unwrap();
    assert_eq!((span.get("penstock.carried_by"), span.get("penstock.reason")), ("ingress", "ok"));
    let (_, first_byte, _) = span.events[0];
    // The endpoint's pause starts before its first byte is seen, so most of it, not all, lies between that byte and the end.
    assert!(span.begin < first_byte && first_byte + 200_000_000 <= span.end, "{span:?}");
}
