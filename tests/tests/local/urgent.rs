//! Urgent data (MSG_OOB) from a client, which HTTP does not use: it does not mean that the client has left.

use std::{
    os::fd::{AsRawFd as _, RawFd},
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, send};
use penstock_agent::config::{FailureMode, ListenTls, PickPer, Pool, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, ScriptedEpp, TestAgent,
    agent::{builtin_pool, epp_pool},
    eventually,
    model_server::{Framing, HeadWrites, Lengths, Options, Pauses},
    posts::MODES,
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, reply},
    tls::Certificate,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// How long an endpoint or an EPP waits before it answers.
const WAIT: Duration = Duration::from_millis(700);
const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn urgent_byte_from_client_does_not_end_response() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    for mode in MODES {
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |_| {});
        for framing in [Framing::ContentLength, Framing::Chunked, Framing::UntilClose] {
            let plan = Plan {
                framing,
                size: 200_000,
                stream_id: 3,
                writes: Lengths::Fixed(2000),
                pauses: Some(Pauses { seed: 1, every: 2, up_to_us: 4000 }),
                ..Plan::default()
            };
            let (mut client, raw) = connect(&agent).await;
            client.send(&plan.request()).await.unwrap();
            let head = client.head().await.unwrap();
            assert_eq!(head.status, 200);
            assert_eq!(send(raw, b"!", MsgFlags::MSG_OOB), Ok(1));
            let read = Reader::Fast.take(&mut client, &mut plan.checker()).await;
            let read = read.unwrap_or_else(|error| panic!("{error:#}: {mode:?} {framing:?}"));
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?} {framing:?}");
        }
    }
}

/// While the endpoint has not begun to answer, while the EPP decides, and on a pinned connection between two requests.
#[tokio::test]
async fn urgent_byte_before_response_does_not_end_request() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let picked = server.addr.to_string();
    let picks = Answering::new(move |_| vec![reply::pick(&picked, &[])]);
    let delay = Fault::At(Moment::RequestHeaders, Harm::Delay(WAIT));
    let epp = ScriptedEpp::start(Faulty::new(picks, delay)).await.unwrap();
    for mode in MODES {
        let agent = TestAgent::start(builtin_pool(&[server.addr]), mode, |_| {});
        let (mut client, raw) = connect(&agent).await;
        answers_after_urgent_byte(&mut client, raw, &agent, &server, mode).await;

        let pool = Pool { pick_per: PickPer::Connection, ..builtin_pool(&[server.addr]) };
        let agent = TestAgent::start(pool, mode, |_| {});
        let (mut client, raw) = connect(&agent).await;
        assert_eq!(client.request(&Plan::default().request()).await.unwrap().status(), 200);
        eventually(SOON, || agent.metric("penstock_pinned_connections", &[]) == 1.0).await;
        answers_after_urgent_byte(&mut client, raw, &agent, &server, mode).await;

        let pool = epp_pool(&[server.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, mode, |_| {});
        let (mut client, raw) = connect(&agent).await;
        let before = server.requests();
        client.send(&Plan::default().request()).await.unwrap();
        eventually(SOON, || epp.streams_open() == 1).await;
        assert_eq!(send(raw, b"!", MsgFlags::MSG_OOB), Ok(1));
        assert_eq!(server.requests(), before, "the EPP has decided");
        assert_eq!(client.response().await.unwrap().status(), 200, "{mode:?}");
        assert_eq!(agent.count("penstock_requests_total", &[r#"reason="client_gone""#]), 0, "{mode:?}");
        eventually(SOON, || epp.streams_open() == 0).await;
    }
}

#[tokio::test]
async fn urgent_byte_from_tls_client_does_not_end_request() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let certificate = Certificate::new("agent.example").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
    let tls = ListenTls { address: "127.0.0.1:0".parse().unwrap(), cert_file, key_file, ..ListenTls::default() };
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Auto, |config| {
        config.listen.tls = Some(tls);
    });
    let addr = agent.agent.tls_address().unwrap();
    let stream = TcpStream::connect(addr).await.unwrap();
    let raw = stream.as_raw_fd();
    let mut client = Client::over(certificate.over(stream, &["http/1.1"]).await.unwrap(), addr);
    answers_after_urgent_byte(&mut client, raw, &agent, &server, SteeringMode::Auto).await;
}

async fn connect(agent: &TestAgent) -> (Client, RawFd) {
    let stream = TcpStream::connect(agent.addr).await.unwrap();
    let raw = stream.as_raw_fd();
    (Client::over(stream, agent.addr), raw)
}

/// The byte is sent once the endpoint has the request, well before its answer.
async fn answers_after_urgent_byte<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut Client<S>,
    raw: RawFd,
    agent: &TestAgent,
    server: &ModelServer,
    mode: SteeringMode,
) {
    let pause_us = WAIT.as_micros() as u64;
    let head = HeadWrites { split_at: Some(0), pause_us, ..HeadWrites::default() };
    let plan = Plan { size: 1000, stream_id: 4, head, ..Plan::default() };
    let (before, sent) = (server.requests(), Instant::now());
    client.send(&plan.request()).await.unwrap();
    eventually(SOON, || server.requests() == before + 1).await;
    assert_eq!(send(raw, b"!", MsgFlags::MSG_OOB), Ok(1));
    assert!(sent.elapsed() < WAIT, "the response has begun");
    let response = client.response().await.unwrap_or_else(|error| panic!("{error:#}: {mode:?}"));
    plan.checker().feed(&response.body).unwrap();
    assert_eq!((response.status(), response.read.end, response.read.len), (200, BodyEnd::Complete, 1000), "{mode:?}");
    assert!(sent.elapsed() >= WAIT);
    assert_eq!(server.requests(), before + 1, "{mode:?}");
    assert_eq!(agent.count("penstock_requests_total", &[r#"reason="client_gone""#]), 0, "{mode:?}");
}
