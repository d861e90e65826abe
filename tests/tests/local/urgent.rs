//! Urgent data (MSG_OOB) from a client, which HTTP does not use: it does not mean that the client has left.

use std::{os::fd::AsRawFd as _, time::Duration};

use nix::sys::socket::{MsgFlags, send};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader, TestAgent,
    agent::builtin_pool,
    model_server::{Framing, Lengths, Options, Pauses},
    posts::MODES,
};

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
            let stream = tokio::net::TcpStream::connect(agent.addr).await.unwrap();
            let raw = stream.as_raw_fd();
            let mut client = Client::over(stream, agent.addr);
            client.send(&plan.request()).await.unwrap();
            let head = client.head().await.unwrap();
            assert_eq!(head.status, 200);
            assert_eq!(send(raw, b"!", MsgFlags::MSG_OOB), Ok(1));
            let read = Reader::Fast.take(&mut client, &mut plan.checker()).await;
            let read = read.unwrap_or_else(|error| panic!("{error:#}: {mode:?} {framing:?}"));
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?} {framing:?}");
        }
        // Also before the response begins.
        let plan = Plan { size: 1000, ..Plan::default() };
        let stream = tokio::net::TcpStream::connect(agent.addr).await.unwrap();
        let raw = stream.as_raw_fd();
        let mut client = Client::over(stream, agent.addr);
        client.send(&plan.request().header("x-test-slow", "1")).await.unwrap();
        let _ = send(raw, b"!", MsgFlags::MSG_OOB);
        tokio::time::timeout(Duration::from_secs(10), client.head()).await.expect("no response").unwrap();
    }
}
