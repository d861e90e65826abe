//! The end of a kept connection that crosses with a POST: the endpoint has said so before anything of the request arrived. Whether
//! the request may go elsewhere depends on what the endpoint can still read.

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    TestAgent,
    agent::builtin_pool,
    client::Client,
    eventually,
    stage::{echo, json},
};
use socket2::{SockFilter, SockRef};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};

use crate::{SOON, abrupt::whole};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// How the endpoint ends its first connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It sends no more, and reads and executes what comes.
    HalfClose,
    Close,
}

/// Executes every request that it reads. What follows the first one is lost on its way until the connection has been ended.
struct Endpoint {
    addr: SocketAddr,
    executed: Arc<AtomicU64>,
}

impl Endpoint {
    async fn start(end: End) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (addr, executed) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
        let count = Arc::clone(&executed);
        tokio::spawn(async move {
            let (stream, peer) = listener.accept().await.unwrap();
            tokio::spawn(first(stream, peer, end, Arc::clone(&count)));
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&count)));
            }
        });
        Self { addr, executed }
    }

    fn executed(&self) -> u64 {
        self.executed.load(Relaxed)
    }
}

async fn first(mut stream: TcpStream, peer: SocketAddr, end: End, executed: Arc<AtomicU64>) {
    whole(&mut stream).await.unwrap();
    executed.fetch_add(1, Relaxed);
    // Before the answer, so that nothing of the next request can arrive.
    lose_payload(&stream);
    stream.write_all(ANSWER).await.unwrap();
    eventually(SOON, || lost(peer)).await;
    if end == End::Close {
        SockRef::from(&stream).detach_filter().unwrap();
        return;
    }
    SockRef::from(&stream).shutdown(std::net::Shutdown::Write).unwrap();
    SockRef::from(&stream).detach_filter().unwrap();
    if whole(&mut stream).await.is_ok() {
        executed.fetch_add(1, Relaxed);
    }
}

async fn serve(mut stream: TcpStream, executed: Arc<AtomicU64>) {
    while whole(&mut stream).await.is_ok() {
        executed.fetch_add(1, Relaxed);
        stream.write_all(ANSWER).await.unwrap();
    }
}

/// Drops every segment that is longer than a TCP header can be.
fn lose_payload(stream: &TcpStream) {
    const LONGEST_HEADER: u32 = 60;
    let instruction = |code: u32, jt, jf, k| SockFilter::new(code as u16, jt, jf, k);
    let filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_LEN, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 0, 1, LONGEST_HEADER),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    SockRef::from(stream).attach_filter(&filter).unwrap();
}

/// Whether something that `peer` has sent was dropped.
fn lost(peer: SocketAddr) -> bool {
    let filter = format!("dport = :{}", peer.port());
    let output = Command::new("ss").args(["-tmnH", &filter]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = String::from_utf8(output.stdout).unwrap();
    let drops = shown.split_once(",d").and_then(|(_, rest)| rest.split_once(')')).expect("skmem of the connection").0;
    drops != "0"
}

#[tokio::test]
async fn post_that_crosses_with_a_fin_is_executed_once() {
    for (end, status) in [(End::HalfClose, 502), (End::Close, 200)] {
        let endpoint = Endpoint::start(end).await;
        let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Off, |config| {
            config.listen.workers = 1;
            config.pools[0].ejection.failures = 0;
        });
        let mut client = Client::connect(agent.addr).await.unwrap();
        assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 200);
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), status, "{end:?}");
        eventually(SOON, || endpoint.executed() >= 2).await;
        assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 200);
        assert_eq!(endpoint.executed(), 3, "{end:?}");
        let reused = agent.count("penstock_endpoint_connections_total", &["result=\"reused\""]);
        assert!(reused >= 1, "the second request was to be sent on the first connection");
    }
}
