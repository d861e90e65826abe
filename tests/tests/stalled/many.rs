//! Five hundred stalled clients with small buffers at every socket, so that the test's own ends hold little and known amounts.
//!
//! Three measurements are taken during the stall. The exact one is the servers': they cannot send what is not taken. The others
//! are what the kernel charges each of the agent's sockets for, and the agent's memory. Redirected bytes not yet in a send queue
//! are charged to no socket; they count in the first, and in the whole machine's kernel pages, whose bound is therefore loose.

use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use penstock_tests::{
    BodyEnd, Checker, Client, ModelServer, Plan, Reader, Request,
    agent_process::AgentProcess,
    alone, eventually,
    model_server::{Fault, FaultKind, Framing, Lengths, Options},
    reader::at_least,
};
use socket2::{Domain, Socket, Type};

use crate::{KIB, MIB, memory::Memory, mib, sockets::TcpSocket, wmem};

const CLIENTS: u64 = 500;
/// `client_send_buffer` and `endpoint_receive_buffer`.
const SEND: u64 = 64 * KIB;
const RECEIVE: u64 = 64 * KIB;
/// What user space may hold of a relayed response: one read.
const READ: u64 = 64 * KIB;
/// What it takes: the agent's allocator puts seven such buffers into 512 KiB.
const ALLOCATED: u64 = 512 * KIB / 7;
/// Buffers requested by the test's ends; the kernel doubles them.
const SERVER: u64 = 16 * KIB;
const CLIENT: u64 = 8 * KIB;
/// The kernel checks the limit before it takes a piece, so a buffer may exceed its limit by one.
const PIECE: u64 = 16 * KIB;
/// Loopback segments are 64 KiB, and the kernel would size send buffers for ten of them.
const SEGMENT: u32 = 1400;
/// What is sent first, in writes of this size, followed by a pause, so that the flow is armed when the rest arrives.
const FIRST: u64 = 4 * KIB;
const BODY: u64 = MIB / 2;
const WRITE: u64 = 4 * KIB;
const SOON: Duration = Duration::from_secs(30);
/// Servers are blocked once they have sent nothing for this long.
const QUIET: Duration = Duration::from_millis(500);

#[tokio::test]
async fn many_stalled_clients_on_ingress_stay_bounded() {
    let _alone = alone().await;
    stall("ingress").await;
}

#[tokio::test]
async fn many_stalled_clients_on_local_stay_bounded() {
    let _alone = alone().await;
    stall("local").await;
}

#[tokio::test]
async fn many_stalled_clients_on_auto_stay_bounded() {
    let _alone = alone().await;
    stall("auto").await;
}

#[tokio::test]
async fn many_stalled_clients_on_relay_stay_bounded() {
    let _alone = alone().await;
    stall("off").await;
}

async fn stall(steering: &str) {
    allow_descriptors();
    let options =
        Options { send_buffer: Some(SERVER as usize), idle_close: None, keep_requests: false, ..Options::default() };
    let server = ModelServer::start(options).await.unwrap();
    let settings = format!("client_send_buffer = {SEND}\nendpoint_receive_buffer = {RECEIVE}");
    let agent = AgentProcess::start("127.0.0.1:0".parse().unwrap(), server.addr, steering, &settings).await.unwrap();
    let mut clients = Vec::new();
    for id in 0..CLIENTS {
        clients.push(begun(&agent, id).await);
    }
    agent.until_idle().await.unwrap();
    let (before, sent) = (Memory::now(&agent), server.written());

    server.resume();
    until_blocked(&server).await;
    let held = Memory::now(&agent);
    // The agent's ends.
    let to_clients = TcpSocket::all(&format!("sport = :{}", agent.addr.port()));
    let to_endpoints = TcpSocket::all(&format!("dport = :{}", server.addr.port()));
    assert_eq!((to_clients.len() as u64, to_endpoints.len() as u64), (CLIENTS, CLIENTS));
    let (sends, receives) = (most(&to_clients, |one| one.send), most(&to_endpoints, |one| one.receive));
    let send_limit = most(&to_clients, |one| one.send_limit);
    let receive_limit = most(&to_endpoints, |one| one.receive_limit);
    let each = |bytes: u64| bytes.div_ceil(CLIENTS);
    // Besides whole writes, the kernel may hold part of one from each server.
    let on_its_way = each(server.written() - sent) + WRITE;
    let process = each(held.rss.saturating_sub(before.rss));
    let kernel = held.kernel.saturating_sub(before.kernel);
    let kib = |bytes: u64| bytes as f64 / KIB as f64;
    println!("{steering}: in flight {:.1} KiB each, agent + {:.1} KiB each", kib(on_its_way), kib(process));
    println!(
        "{steering}: send buffers {:.1} KiB each, at most {:.1} of {:.1}; receive buffers {:.1} KiB each, at most {:.1} of {:.1}",
        kib(each(all(&to_clients, |one| one.send))),
        kib(sends),
        kib(send_limit),
        kib(each(all(&to_endpoints, |one| one.receive))),
        kib(receives),
        kib(receive_limit),
    );
    println!(
        "{steering}: machine: kernel + {:.1} MiB, all sockets + {:.1} MiB",
        mib(kernel),
        mib(held.sockets.saturating_sub(before.sockets))
    );

    if steering == "off" {
        // The kernel sizes them automatically, up to its limit.
        assert!(send_limit <= wmem());
    } else {
        assert!(to_clients.iter().all(|one| one.send_limit == SEND), "{to_clients:?}");
    }
    assert_eq!(receive_limit, RECEIVE);
    assert!(sends <= send_limit + PIECE && receives <= receive_limit + PIECE, "{to_clients:?} {to_endpoints:?}");
    // As with one client, the process may need some memory for itself.
    assert!(held.rss <= before.rss + CLIENTS * ALLOCATED + 8 * MIB, "{before:?} {held:?}");
    let bound = send_limit + RECEIVE + READ + 2 * SERVER + 2 * CLIENT;
    assert!(on_its_way <= bound, "{on_its_way} bytes in flight to each client, {bound} allowed");
    // Kernel pages are never full, and other processes use the machine.
    assert!(kernel <= 2 * CLIENTS * bound + 128 * MIB, "{before:?} {held:?}");

    for (client, checker) in &mut clients {
        let read = Reader::Fast.take(client, checker).await.unwrap();
        assert_eq!((read.end, read.len), (BodyEnd::Complete, BODY));
        // Bytes are counted before the connection's next request is answered.
        assert_eq!(client.request(&Request::get("/v1/models")).await.unwrap().status(), 200);
    }
    check_counters(steering, &agent).await;
}

/// Waits until the server cannot send any more.
async fn until_blocked(server: &ModelServer) {
    let mut last = (Instant::now(), server.written());
    eventually(SOON, || {
        if server.written() != last.1 {
            last = (Instant::now(), server.written());
        }
        last.0.elapsed() >= QUIET
    })
    .await;
}

fn most(sockets: &[TcpSocket], of: fn(&TcpSocket) -> u64) -> u64 {
    sockets.iter().map(of).max().unwrap_or(0)
}

fn all(sockets: &[TcpSocket], of: fn(&TcpSocket) -> u64) -> u64 {
    sockets.iter().map(of).sum()
}

/// Asserts which path carried the bytes, and that it was disarmed for lack of room.
async fn check_counters(steering: &str, agent: &AgentProcess) {
    let count = async |name, label: &str| agent.metric(name, &[label]).await.unwrap() as u64;
    let (ingress, local) = (r#"path="ingress""#, r#"path="local""#);
    let bytes = (count("penstock_body_bytes_total", ingress).await, count("penstock_body_bytes_total", local).await);
    let room = count("penstock_steer_stops_total", r#"reason="room""#).await;
    println!(
        "{steering}: {bytes:?} bytes carried by the kernel (ingress, local); disarmed {room} times for lack of room"
    );
    match steering {
        "off" => assert_eq!((bytes, room), ((0, 0), 0)),
        "ingress" => assert!(bytes.0 >= CLIENTS * WRITE && bytes.1 == 0 && room >= CLIENTS),
        _ => assert!(bytes.1 >= CLIENTS * WRITE && room >= CLIENTS),
    }
}

/// A client whose response has begun; it pauses after the first bytes until the server is told to continue.
async fn begun(agent: &AgentProcess, stream_id: u64) -> (Client, Checker) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
    socket.set_recv_buffer_size(CLIENT as usize).unwrap();
    socket.set_tcp_mss(SEGMENT).unwrap();
    let stream = tokio::net::TcpSocket::from_std_stream(socket.into()).connect(agent.addr).await.unwrap();
    let mut client = Client::over(stream, agent.addr);
    let plan = Plan {
        framing: Framing::ContentLength,
        size: BODY,
        stream_id,
        writes: Lengths::Fixed(WRITE),
        fault: Some(Fault { after: FIRST, kind: FaultKind::UntilTold }),
        ..Plan::default()
    };
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    assert_eq!(at_least(&mut client, &mut checker, FIRST).await.unwrap(), None);
    (client, checker)
}

/// This process has two sockets per client.
fn allow_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
