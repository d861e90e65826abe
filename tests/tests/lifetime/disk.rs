//! A full disk refuses the request bodies that do not fit on it, and harms no other request.

use std::time::Instant;

use penstock_tests::{
    BodyEnd, Client, ModelServer, Mounted, Plan, Reader, Request,
    agent_process::AgentProcess,
    content::{Alphabet, Fnv},
    model_server::Options,
    reader::at_least,
};

use crate::{ANY_PORT, SOON};

const DISK: u64 = 1 << 20;
const FITS: usize = 1_000_000;

fn upload(length: usize) -> Request {
    Request::post("/test/echo", Alphabet::Text.bytes(5, 0, length))
}

async fn freed(agent: &AgentProcess) {
    let begin = Instant::now();
    while agent.metric("penstock_request_body_spill_bytes", &[]).await.unwrap() > 0.0 {
        assert!(begin.elapsed() < SOON, "the files of bodies were not freed");
    }
}

#[tokio::test]
async fn full_disk_refuses_bodies_and_harms_no_other_request() {
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let disk = Mounted::disk(DISK).unwrap();
    let folder = format!("TMPDIR={}", disk.path().display());
    let settings = "[limits]\nbody_memory_bytes = 1000\n";
    let agent = AgentProcess::start_through(&["env", &folder], ANY_PORT, server.addr, "off", settings).await.unwrap();
    let plan = Plan { size: 8 << 20, ..Plan::default() };
    let mut running = Client::connect_with(agent.addr, Some(64 << 10)).await.unwrap();
    running.send(&plan.request()).await.unwrap();
    assert_eq!(running.head().await.unwrap().status, 200);
    let mut checker = plan.checker();
    assert_eq!(at_least(&mut running, &mut checker, 1000).await.unwrap(), None);

    for round in 1..=3 {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let refused = client.request(&upload(3 * DISK as usize)).await.unwrap();
        assert_eq!((refused.status(), refused.error_code().as_str()), (503, "bodies_full"));
        assert_eq!(refused.header("retry-after"), Some("1"));
        let count = agent.metric("penstock_request_bodies_refused_total", &["reason=\"disk\""]).await.unwrap();
        assert_eq!(count, f64::from(round));
        // A file is freed on a thread of its own.
        freed(&agent).await;
        // So it fits only if nothing of the refused body is left.
        for length in [FITS, 10] {
            let mut client = Client::connect(agent.addr).await.unwrap();
            let echo = client.request(&upload(length)).await.unwrap().echoed();
            let sent = Alphabet::Text.bytes(5, 0, length);
            assert_eq!((echo.body_length, echo.body_hash), (length as u64, Fnv::of(&sent).value()));
        }
        freed(&agent).await;
        assert_eq!(std::fs::read_dir(disk.path()).unwrap().count(), 0);
    }
    let spilled = agent.metric("penstock_request_bodies_spilled_total", &[]).await.unwrap();
    assert!(spilled >= 6.0, "{spilled}");
    assert_eq!(agent.metric("penstock_request_bodies_refused_total", &[]).await.unwrap(), 3.0);
    let read = Reader::Fast.take(&mut running, &mut checker).await.unwrap();
    assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, plan.size));
}
