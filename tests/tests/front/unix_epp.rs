//! An EPP at a Unix socket.

use std::path::Path;

use penstock_agent::config::{Epp, FailureMode, Picker, Pool, SteeringMode};
use penstock_tests::{
    Client, ModelServer, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    eventually,
    scripted_epp::LlmdRouter,
    stage::{echo, json},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpStream, UnixListener},
    task::JoinHandle,
};

use crate::SOON;

/// Passes connections to this socket on to the EPP, until it is aborted.
fn listen(path: &Path, epp: &ScriptedEpp) -> JoinHandle<()> {
    let (listener, epp) = (UnixListener::bind(path).unwrap(), epp.addr);
    tokio::spawn(async move {
        let mut open = tokio::task::JoinSet::new();
        while let Ok((mut client, _)) = listener.accept().await {
            open.spawn(async move {
                let mut server = TcpStream::connect(epp).await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    })
}

async fn status(agent: &TestAgent) -> u16 {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.request(&echo(json("m", 1000))).await.unwrap().status()
}

#[tokio::test]
async fn epp_at_a_unix_socket_picks_also_after_it_was_away() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let epp = ScriptedEpp::start(LlmdRouter::new(&[endpoint.addr])).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("epp.sock");
    let pool = epp_pool(&[endpoint.addr], epp.addr, FailureMode::Closed);
    let Picker::Epp(settings) = pool.picker.clone() else { unreachable!("an EPP") };
    let address = format!("unix:{}", path.display());
    let picker = Picker::Epp(Epp { addresses: vec![address.clone()], ..settings });
    let serving = listen(&path, &epp);
    let agent = TestAgent::start(Pool { picker, ..pool }, SteeringMode::Off, |config| config.listen.workers = 1);
    for _ in 0..3 {
        assert_eq!(status(&agent).await, 200);
    }
    assert_eq!(epp.streams().len(), 3);
    let replica = format!("replica=\"{address}\"");
    assert_eq!(agent.count("penstock_epp_replicas", &[&replica]), 1);
    serving.abort();
    let _ = serving.await;
    std::fs::remove_file(&path).unwrap();
    eventually(SOON, || agent.count("penstock_epp_connections", &[]) == 0).await;
    assert_eq!(status(&agent).await, 503);
    let _serving = listen(&path, &epp);
    let begin = std::time::Instant::now();
    while status(&agent).await != 200 {
        assert!(begin.elapsed() < SOON, "the EPP is not asked again");
    }
}
