//! Everything at once, at random: framings, sizes, pauses, buffers, slow and impatient clients, endpoints that break off.
//! A byte that is lost, doubled or swapped is told with its place; the seed repeats a client's requests.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Random, Reader,
    agent::{TestAgent, builtin_pool},
    eventually,
    model_server::{Fault, FaultKind, Framing, HeadWrites, Lengths, Options, Pauses},
    reader::at_least,
};

const CLIENTS: u64 = 16;

#[tokio::test]
async fn off() {
    stress(SteeringMode::Off, Duration::from_secs(3)).await;
}

#[tokio::test]
async fn auto() {
    stress(SteeringMode::Auto, Duration::from_secs(3)).await;
}

#[tokio::test]
async fn ingress() {
    stress(SteeringMode::Ingress, Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn local() {
    stress(SteeringMode::Local, Duration::from_secs(10)).await;
}

/// What one client has seen.
#[derive(Default)]
struct Tally {
    complete: u64,
    broken: u64,
    left: u64,
    bytes: u64,
}

async fn stress(mode: SteeringMode, time: Duration) {
    let seed = Random::fresh_seed();
    println!("seed {seed}");
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |_| {});
    let until = Instant::now() + time;
    let clients = (0..CLIENTS).map(|number| client(&agent, Random::new(seed + number), until));
    let tallies = try_join_all(clients).await.unwrap_or_else(|error| panic!("{mode:?} seed {seed}: {error:#}"));
    let sum = |field: fn(&Tally) -> u64| tallies.iter().map(field).sum::<u64>();
    let count = |name, labels: &[&str]| agent.count(name, labels);
    eventually(Duration::from_secs(10), || agent.metric("penstock_active_requests", &[]) == 0.0).await;
    let steered = agent.steered();
    let relayed = count("penstock_body_bytes_total", &[r#"path="relay""#]);
    let stops = ["refused", "framing", "room", "target", "fin"]
        .map(|reason| (reason, count("penstock_steer_stops_total", &[&format!("\"{reason}\"")])));
    println!(
        "{mode:?} seed {seed}: {} complete, {} broken by the endpoint, {} left by the client, {} bytes read; \
         flows {}, steered {steered}, relayed {relayed}, stops {stops:?}",
        sum(|tally| tally.complete),
        sum(|tally| tally.broken),
        sum(|tally| tally.left),
        sum(|tally| tally.bytes),
        count("penstock_flows_total", &[]),
    );
    assert!(sum(|tally| tally.complete) > 0);
    assert_eq!(steered > 0, mode != SteeringMode::Off);
    assert!(steered + relayed >= sum(|tally| tally.bytes));
    // Nothing is held for requests that are over: what is open now is kept for the next.
    eventually(Duration::from_secs(10), || server.connections_open() <= CLIENTS).await;
}

async fn client(agent: &TestAgent, mut random: Random, until: Instant) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut kept = None;
    while Instant::now() < until {
        let plan = plan(&mut random);
        let rcvbuf = [None, Some(2048), Some(16 << 10), Some(256 << 10)][random.below(4) as usize];
        let client = match kept.take() {
            Some(client) => client,
            None => Client::connect_with(agent.addr, rcvbuf).await?,
        };
        kept = exchange(client, &plan, &mut random, &mut tally).await.with_context(|| format!("{plan:?}"))?;
    }
    Ok(tally)
}

/// One response; the client again when its connection goes on.
async fn exchange(mut client: Client, plan: &Plan, random: &mut Random, tally: &mut Tally) -> Result<Option<Client>> {
    client.send(&plan.request()).await?;
    let head = match client.head().await {
        Ok(head) => head,
        // A body that only the close ends is broken off by a reset, which may take the head with it.
        Err(error) if plan.fault.is_some() && error.to_string().contains("Reset") => {
            tally.broken += 1;
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if head.status == 502 && plan.fault.is_some() {
        // The reset took the head with it.
        tally.broken += 1;
        client.read_body(penstock_tests::client::Pace::Fast, |_| Ok(())).await?;
        return Ok(Some(client));
    }
    ensure!(head.status == 200, "status {}", head.status);
    let mut checker = plan.checker();
    if random.one_in(8) {
        at_least(&mut client, &mut checker, random.below(plan.size + 1)).await?;
        tally.bytes += checker.offset();
        tally.left += 1;
        if random.one_in(2) {
            client.reset()?;
        }
        return Ok(None);
    }
    let reader = match random.below(4) {
        0 => {
            // Half a second at most.
            let bytes = 1 + plan.size / 250 + random.below(100_000);
            Reader::Slow { bytes: bytes as usize, tick: Duration::from_millis(1) }
        }
        1 => Reader::Stalled { after: random.below(plan.size + 1), pause: Duration::from_millis(random.below(100)) },
        _ => Reader::Fast,
    };
    let read = reader.take(&mut client, &mut checker).await?;
    tally.bytes += read.wire;
    let told = match plan.fault {
        None => {
            ensure!(read.end == BodyEnd::Complete, "{:?} after {} bytes", read.end, read.len);
            ensure!(read.len == plan.size, "{} bytes of {}", read.len, plan.size);
            tally.complete += 1;
            return Ok((plan.framing != Framing::UntilClose).then_some(client));
        }
        // Nobody can tell this end from the right one.
        Some(Fault { kind: FaultKind::Close, after }) if plan.framing == Framing::UntilClose => {
            read.end == BodyEnd::Complete && read.len == after
        }
        Some(Fault { kind: FaultKind::Reset, .. }) if plan.framing == Framing::UntilClose => read.end == BodyEnd::Reset,
        Some(_) => read.end != BodyEnd::Complete,
    };
    ensure!(told, "{:?} after {} bytes ({} on the wire)", read.end, read.len, read.wire);
    tally.broken += 1;
    Ok(None)
}

fn plan(random: &mut Random) -> Plan {
    let framing = random.pick(&[Framing::ContentLength, Framing::Chunked, Framing::UntilClose]);
    let most = random.pick(&[1, 1000, 100_000, 3_000_000]);
    let size = random.below(most + 1);
    let seed = random.below(u64::MAX);
    let writes = match random.below(5) {
        0 if size < 5000 => Lengths::OneByte,
        0 | 1 => Lengths::Fixed(64 << 10),
        2 => Lengths::Random { seed, max: 1000.max(size / 50) },
        _ => Lengths::Random { seed, max: 100_000 },
    };
    let every = if size > 100_000 { 8 } else { 2 };
    let chunked = framing == Framing::Chunked;
    let fault = (size > 0 && random.one_in(6))
        .then(|| Fault { after: random.below(size), kind: random.pick(&[FaultKind::Reset, FaultKind::Close]) });
    Plan {
        framing,
        size,
        stream_id: seed,
        chunks: if random.one_in(5) { Lengths::Fixed(64 << 10) } else { Lengths::Random { seed, max: 1 + size / 10 } },
        chunk_extension: (chunked && random.one_in(2)).then(|| "a=b".to_owned()),
        trailers: if chunked && random.one_in(2) { vec![("x-t".to_owned(), "v".to_owned())] } else { Vec::new() },
        head: HeadWrites { with_body: random.one_in(2), pause_us: random.below(500), ..HeadWrites::default() },
        writes,
        pauses: random.one_in(2).then_some(Pauses { seed, every, up_to_us: 1500 }),
        cork: framing == Framing::UntilClose && random.one_in(2),
        fault,
        ..Plan::default()
    }
}
