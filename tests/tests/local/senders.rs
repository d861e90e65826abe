//! Every way of sending, to clients of every speed: the bytes are exact, no side waits in vain, and the path `local` carries.
//!
//! A sender whose bytes are redirected must see the same results and events as otherwise. If not, it would wait for a wakeup
//! that never comes (edge-triggered) or retry forever (level-triggered).

use std::time::Duration;

use penstock_agent::config::{PathPattern, Pool, Route, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Plan, Reader, Request, Sender, TestAgent,
    agent::builtin_pool,
    alone, eventually,
    model_server::{Framing, Lengths},
    sender::{
        Calls::{self, Send, SendFile, Turns, Vectored, ZeroCopy},
        Options,
        Waits::{self, Blocking, EdgeTriggered, LevelTriggered},
    },
};

use crate::{carried, stops};

const SOON: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
const READERS: [(Reader, u64); 3] = [
    (Reader::Fast, 2 * MIB),
    (Reader::Slow { bytes: 16 << 10, tick: Duration::from_millis(1) }, MIB),
    // Larger than all buffers in between.
    (Reader::Stalled { after: 100_000, pause: Duration::from_millis(200) }, 7 * MIB),
];

macro_rules! senders {
    ($($name:ident: $([$waits:ident $calls:expr])+;)+) => {
        $(#[tokio::test] async fn $name() { send(&[$(($waits, $calls)),+]).await; })+
    };
}

senders! {
    blocking_sender_is_exact: [Blocking Send(10_000)] [Blocking Send(300_000)];
    level_triggered_sender_is_exact: [LevelTriggered Send(10_000)] [LevelTriggered Send(300_000)];
    edge_triggered_sender_is_exact: [EdgeTriggered Send(10_000)] [EdgeTriggered Send(300_000)];
    alternating_threads_are_exact: [Blocking Turns(4)] [EdgeTriggered Turns(4)];
    many_small_pieces_are_exact: [Blocking Vectored] [EdgeTriggered Vectored];
    sendfile_is_exact: [Blocking SendFile] [EdgeTriggered SendFile];
}

/// An agent with one pool per endpoint, selected by the first path segment.
fn agent(senders: &[Sender]) -> TestAgent {
    TestAgent::start(builtin_pool(&[senders[0].addr]), SteeringMode::Local, |config| {
        for (index, sender) in senders.iter().enumerate() {
            let name = format!("pool-{index}");
            config.routes.push(Route { path: Some(PathPattern::Prefix(format!("/{index}"))), ..Route::to(&name) });
            config.pools.push(Pool { name, ..builtin_pool(&[sender.addr]) });
        }
    })
}

/// Every framing and speed at once; compares every response and the agent's count of it.
async fn exchanges(agent: &TestAgent, pool: usize) {
    let exchanged = || agent.count("penstock_requests_total", &[r#"reason="ok""#]);
    let counted = || agent.count("penstock_body_bytes_total", &[]);
    let before = (exchanged(), counted());
    let mut tasks = Vec::new();
    for framing in [Framing::ContentLength, Framing::Chunked] {
        for (reader, size) in READERS {
            for rcvbuf in [None, Some(8192)] {
                let seed = 1 + tasks.len() as u64;
                let chunks = Lengths::Random { seed, max: 20_000 };
                let plan = Plan { framing, size, stream_id: seed, chunks, ..Plan::default() };
                let request = Request::get(&format!("/{pool}/body")).header("x-test-plan", plan.header());
                let addr = agent.addr;
                tasks.push(tokio::spawn(async move {
                    let what = format!("{framing:?} {reader:?} {rcvbuf:?}");
                    let mut client = Client::connect_with(addr, rcvbuf).await.unwrap();
                    client.send(&request).await.unwrap();
                    let head = client.head().await.unwrap_or_else(|error| panic!("{error:#}: {what}"));
                    assert_eq!(head.status, 200, "{what}");
                    let read = reader.take(&mut client, &mut plan.checker()).await;
                    let read = read.unwrap_or_else(|error| panic!("{error:#}: {what}"));
                    assert_eq!((read.end, read.len), (BodyEnd::Complete, size), "{what}");
                    read.wire
                }));
            }
        }
    }
    let (exchanges, mut wire) = (tasks.len() as u64, 0);
    for task in tasks {
        wire += task.await.unwrap();
    }
    eventually(SOON, || exchanged() == before.0 + exchanges).await;
    assert_eq!(counted(), before.1 + wire);
}

async fn send(ways: &[(Waits, Calls)]) {
    let _alone = alone().await;
    let senders: Vec<Sender> =
        ways.iter().map(|(waits, calls)| Sender::start(Options::new(*waits, *calls)).unwrap()).collect();
    let agent = agent(&senders);
    let (mut steered, mut rooms) = (0, 0);
    for (index, (sender, (waits, calls))) in senders.iter().zip(ways).enumerate() {
        exchanges(&agent, index).await;
        let (sent, refused) = (sender.sent(), sender.refused());
        let more = (carried(&agent, "local") - steered, stops(&agent, "room") - rooms);
        println!(
            "{waits:?} {calls:?}: {} bytes steered, {} times no room; {sent} calls, {refused} refused",
            more.0, more.1
        );
        (steered, rooms) = (steered + more.0, rooms + more.1);
        assert_eq!(sender.stalled(), 0, "{waits:?} {calls:?}");
        assert!(more.0 > MIB, "{waits:?} {calls:?}: {} bytes steered", more.0);
        assert!(more.1 > 0, "{waits:?} {calls:?}: the room gate did not trip");
        // A sender would retry forever on a socket that polls writable and takes nothing.
        assert!(refused <= 2 * sent, "{waits:?} {calls:?}: refused {refused} times, {sent} calls sent something");
    }
}

/// The kernel reports completed calls by number, and would also count a redirected one.
#[tokio::test]
async fn zerocopy_sender_gets_every_notification() {
    let mut at_once = Options::new(Blocking, ZeroCopy);
    at_once.zerocopy_from_the_start = true;
    let senders = [at_once, Options::new(Blocking, ZeroCopy)].map(|options| Sender::start(options).unwrap());
    let agent = agent(&senders);
    exchanges(&agent, 0).await;
    let (calls, completed) = senders[0].zerocopy();
    assert_eq!((stops(&agent, "account"), carried(&agent, "local"), carried(&agent, "ingress")), (0, 0, 0));
    // The sender waits for the notifications before it reads the next request; the client may be faster.
    eventually(SOON, || senders[0].zerocopy().1 == calls).await;
    println!("{calls} calls, {completed} completed when all had arrived");

    // SO_ZEROCOPY set on a connection that the agent already knows, before its response: the socket stays out of the map, and
    // calls are counted.
    exchanges(&agent, 1).await;
    let (calls, _) = senders[1].zerocopy();
    assert!(calls > 0, "{calls} calls");
    eventually(SOON, || senders[1].zerocopy().1 == calls).await;
    assert_eq!((stops(&agent, "account"), carried(&agent, "local"), senders[1].stalled()), (0, 0, 0));
}
