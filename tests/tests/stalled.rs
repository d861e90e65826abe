//! A client that stops reading in the middle of a gibibyte: what is on its way stays within the buffers that were
//! configured, in user space and in the kernel, and the client gets every byte when it goes on.
//!
//! The sharp bound is told by the server: it cannot send what nobody takes. What the kernel redirects without a limit would
//! be in no socket's account, only in pages that are neither free nor anybody's, and would come to the whole body; that
//! figure is the whole machine's, so it gets 64 MiB on top. MemAvailable, which whatever runs beside the test moves by
//! hundreds of MiB, is only printed.

use std::time::{Duration, Instant};

use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader,
    agent_process::AgentProcess,
    eventually,
    model_server::{Framing, Options},
    reader::at_least,
};

const MIB: u64 = 1 << 20;
const BODY: u64 = 1 << 30;
/// `client_send_buffer` and `endpoint_receive_buffer`.
const CONFIGURED: u64 = MIB + MIB / 2;
/// What the client asks for; the kernel doubles it.
const CLIENT: usize = 128 << 10;

#[tokio::test]
async fn ingress() {
    stall("ingress", Duration::from_secs(30)).await;
}

#[tokio::test]
async fn local() {
    stall("local", Duration::from_secs(10)).await;
}

#[tokio::test]
async fn off() {
    stall("off", Duration::from_secs(5)).await;
}

/// Bytes of memory at one moment.
#[derive(Clone, Copy, Debug)]
struct Memory {
    /// Of the agent's process.
    rss: u64,
    available: u64,
    /// Pages that the kernel has for itself, unreclaimable slab included: where socket buffers are.
    kernel: u64,
    /// What sockets are charged for (`/proc/net/sockstat`).
    sockets: u64,
}

impl Memory {
    fn now(agent: &AgentProcess) -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        let others = ["MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "SReclaimable", "PageTables"];
        let kernel = field("MemTotal") - others.iter().map(|name| field(name)).sum::<u64>();
        let sockstat = std::fs::read_to_string("/proc/net/sockstat").unwrap();
        let tcp = sockstat.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
        let pages: u64 = tcp.rsplit(' ').next().and_then(|pages| pages.parse().ok()).unwrap_or(0);
        Self { rss: agent.process.rss().unwrap(), available: field("MemAvailable"), kernel, sockets: pages * 4096 }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

async fn stall(steering: &str, time: Duration) {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = AgentProcess::start("127.0.0.1:0".parse().unwrap(), server.addr, steering, "").await.unwrap();
    let plan = Plan { framing: Framing::ContentLength, size: BODY, stream_id: 3, ..Plan::default() };
    let mut client = Client::connect_with(agent.addr, Some(CLIENT)).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    let before = Memory::now(&agent);
    assert_eq!(at_least(&mut client, &mut checker, 8 * MIB).await.unwrap(), None);

    // The stall is what is tested, so it takes its time; memory is looked at all along. Others use this machine's memory
    // for a while; a backlog stays. So what the kernel holds is the least of the second half.
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
        "{steering}, {} s: on its way {:.1} MiB; agent {:.1} MiB + {:.1}; kernel + {:.1} MiB, sockets + {:.1} MiB, \
         available - {:.1} MiB",
        time.as_secs(),
        mib(on_its_way),
        mib(before.rss),
        mib(held.rss.saturating_sub(before.rss)),
        mib(held.kernel.saturating_sub(before.kernel)),
        mib(held.sockets.saturating_sub(before.sockets)),
        mib(before.available.saturating_sub(held.available)),
    );
    let wmem = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap();
    let server_send_buffer: u64 = wmem.split_whitespace().last().and_then(|bytes| bytes.parse().ok()).unwrap();
    // Without steering the kernel sizes the agent's buffers too, up to its own limits.
    let relayed = if steering == "off" { server_send_buffer + rmem() } else { CONFIGURED };
    let bound = relayed + server_send_buffer + 2 * CLIENT as u64 + MIB;
    assert!(on_its_way <= bound, "{on_its_way} bytes on their way, {bound} allowed");
    assert!(held.rss - before.rss.min(held.rss) <= 8 * MIB, "{before:?} {held:?}");
    let kernel = held.kernel.saturating_sub(before.kernel);
    assert!(kernel <= bound + 64 * MIB, "{before:?} {held:?}");

    let begin = Instant::now();
    let read = Reader::Fast.take(&mut client, &mut checker).await.unwrap();
    assert_eq!((read.end, read.len), (BodyEnd::Complete, BODY));
    let path = format!("path=\"{steering}\"");
    let steered = agent.metric("penstock_body_bytes_total", &[&path]).await.unwrap_or(0.0);
    println!(
        "{steering}: the rest in {:.1} s, {:.1} MiB steered in all",
        begin.elapsed().as_secs_f64(),
        steered / MIB as f64
    );
    assert_eq!(steered > 0.0, steering != "off");
}

/// The most that a receive buffer grows to by itself.
fn rmem() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap();
    text.split_whitespace().last().and_then(|bytes| bytes.parse().ok()).unwrap()
}
