//! Endpoints whose sockets are not plain TCP sockets of their own: accepted by a Multipath TCP listener, or in a sockmap of the
//! endpoint's. They must be served exactly in every mode, and must get their sockets into their maps.

use std::{process::Command, time::Duration};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, Process, Reader, Request, TestAgent, agent::builtin_pool, posts::MODES,
};

use crate::{
    carried,
    servers::{SIZE, STREAM_ID, content, python, script},
};

const SOON: Duration = Duration::from_secs(20);
const POSTED: usize = 300_000;

/// Starts `owned.py` as `kind`, and requests its file whole and in chunks and posts to it, on one connection in each mode.
/// Returns, for each mode, what the server said about its sockets, and the bytes that each path carried.
async fn serve(kind: &str) -> Vec<(SteeringMode, Vec<String>, [u64; 3])> {
    let folder = content();
    let mut command = Command::new(python());
    command.arg(script("owned.py")).arg(kind).arg(folder.path().join("content"));
    let mut server = Process::spawn(command).expect("run `cargo xtask setup --tests`");
    let addr = server.listening(SOON).await.unwrap();
    let mut modes = Vec::new();
    for mode in MODES {
        // One worker, so that the requests of a client use one connection to the endpoint.
        let agent = TestAgent::start(builtin_pool(&[addr]), mode, |config| config.listen.workers = 1);
        let mut client = Client::connect(agent.addr).await.unwrap();
        let mut said = Vec::new();
        for path in ["/bulk", "/stream", "/bulk", "/stream"] {
            client.send(&Request::get(path)).await.unwrap();
            let head = client.head().await.unwrap_or_else(|error| panic!("{error:#}: {kind} {mode:?} {path}"));
            assert_eq!(head.status, 200, "{kind} {mode:?} {path} {head:?}");
            said.push(head.header("x-owned").unwrap_or_default().to_owned());
            let read = Reader::Fast.take(&mut client, &mut Checker::text(STREAM_ID)).await;
            let read = read.unwrap_or_else(|error| panic!("{error:#}: {kind} {mode:?} {path}"));
            assert_eq!((read.end, read.len), (BodyEnd::Complete, SIZE as u64), "{kind} {mode:?} {path}");

            let body = Alphabet::Binary.bytes(STREAM_ID, 0, POSTED);
            let digest: String = ring::digest::digest(&ring::digest::SHA256, &body)
                .as_ref()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            let response = client.request(&Request::post("/post", body)).await;
            let response = response.unwrap_or_else(|error| panic!("{error:#}: {kind} {mode:?} {path}"));
            assert_eq!(response.text(), format!("{POSTED} {digest}"), "{kind} {mode:?}");
        }
        let paths = ["relay", "ingress", "local"].map(|path| carried(&agent, path));
        println!("{kind}, {mode:?}: {said:?}, relay, ingress, local: {paths:?}");
        modes.push((mode, said, paths));
    }
    modes
}

#[tokio::test]
async fn endpoint_that_listens_with_mptcp_is_exact_and_steered() {
    for (mode, said, [relay, ingress, local]) in serve("mptcp").await {
        assert!(said.iter().all(|said| said == "yes"), "{mode:?} {said:?}");
        assert_eq!(mode == SteeringMode::Off, ingress + local == 0, "{mode:?}: {relay} {ingress} {local}");
    }
}

#[tokio::test]
async fn endpoint_with_a_sockmap_of_its_own_is_exact() {
    for kind in ["message", "verdict", "late"] {
        for (mode, said, _) in serve(kind).await {
            assert!(said.iter().all(|said| said == "yes"), "{kind} {mode:?} {said:?}");
        }
    }
}
