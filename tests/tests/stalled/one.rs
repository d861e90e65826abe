//! One stalled client of a response of 256 MiB, with the default buffers.
//!
//! The exact bound comes from the server, which cannot send what is not taken. Bytes redirected without a limit would be charged to
//! no socket, only to kernel pages, and would add up to the whole body; that figure covers the whole machine, so its bound has
//! 64 MiB on top. MemAvailable, which other processes change by hundreds of MiB, is only printed.

use std::time::{Duration, Instant};

use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, Request,
    agent_process::AgentProcess,
    alone, eventually,
    model_server::{Fault, FaultKind, Framing, Options},
    reader::at_least,
};

use crate::{KIB, MIB, memory::Memory, mib, wmem};

/// What is sent first, followed by a pause, so that the flow is armed when the rest arrives.
const FIRST: u64 = 64 * KIB;
const BODY: u64 = 256 * MIB;
const CLIENT_SEND_BUFFER: u64 = MIB;
const ENDPOINT_RECEIVE_BUFFER: u64 = MIB / 2;
/// The buffer that the client requests; the kernel doubles it.
const CLIENT: usize = 128 << 10;

#[tokio::test]
async fn stalled_client_on_ingress_stays_bounded() {
    stall("ingress", Duration::from_secs(10)).await;
}

#[tokio::test]
async fn stalled_client_on_local_stays_bounded() {
    stall("local", Duration::from_secs(10)).await;
}

#[tokio::test]
async fn stalled_client_on_relay_stays_bounded() {
    stall("off", Duration::from_secs(5)).await;
}

async fn stall(steering: &str, time: Duration) {
    let _alone = alone().await;
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = AgentProcess::start("127.0.0.1:0".parse().unwrap(), server.addr, steering, "").await.unwrap();
    let fault = Some(Fault { after: FIRST, kind: FaultKind::UntilTold });
    let plan = Plan { framing: Framing::ContentLength, size: BODY, stream_id: 3, fault, ..Plan::default() };
    let mut client = Client::connect_with(agent.addr, Some(CLIENT)).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    assert_eq!(at_least(&mut client, &mut checker, FIRST).await.unwrap(), None);
    agent.until_idle().await.unwrap();
    server.resume();
    let before = Memory::now(&agent);
    assert_eq!(at_least(&mut client, &mut checker, 8 * MIB).await.unwrap(), None);

    // The stall itself is tested, so it lasts a while, and memory is sampled throughout. Other processes use memory for a time; a
    // backlog stays. The kernel's share is therefore the minimum of the second half.
    let begin = Instant::now();
    let mut held = Memory { rss: 0, available: 0, kernel: u64::MAX, sockets: u64::MAX };
    eventually(time + Duration::from_secs(10), || {
        let now = Memory::now(&agent);
        held.rss = held.rss.max(now.rss);
        if begin.elapsed() >= time / 2 {
            held.available = held.available.max(now.available);
            held.kernel = held.kernel.min(now.kernel);
            held.sockets = held.sockets.min(now.sockets);
        }
        begin.elapsed() >= time
    })
    .await;
    let on_its_way = server.written() - checker.offset();
    println!(
        "{steering}, {} s: in flight {:.1} MiB; agent {:.1} MiB + {:.1}; kernel + {:.1} MiB, sockets + {:.1} MiB, \
         available - {:.1} MiB",
        time.as_secs(),
        mib(on_its_way),
        mib(before.rss),
        mib(held.rss.saturating_sub(before.rss)),
        mib(held.kernel.saturating_sub(before.kernel)),
        mib(held.sockets.saturating_sub(before.sockets)),
        mib(before.available.saturating_sub(held.available)),
    );
    // Without steering the kernel also sizes the client's buffer, up to its limit.
    let client_send_buffer = if steering == "off" { wmem() } else { CLIENT_SEND_BUFFER };
    let bound = client_send_buffer + ENDPOINT_RECEIVE_BUFFER + wmem() + 2 * CLIENT as u64 + MIB;
    assert!(on_its_way <= bound, "{on_its_way} bytes in flight, {bound} allowed");
    assert!(held.rss - before.rss.min(held.rss) <= 8 * MIB, "{before:?} {held:?}");
    let kernel = held.kernel.saturating_sub(before.kernel);
    assert!(kernel <= bound + 64 * MIB, "{before:?} {held:?}");

    let begin = Instant::now();
    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, BODY));
    // Bytes are counted before the connection's next request is answered.
    assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    let path = format!("path=\"{steering}\"");
    let steered = agent.metric("penstock_body_bytes_total", &[&path]).await.unwrap() as u64;
    println!("{steering}: the rest in {:.1} s, {:.1} MiB steered in all", begin.elapsed().as_secs_f64(), mib(steered));
    assert_eq!(steered > 0, steering != "off");
}
