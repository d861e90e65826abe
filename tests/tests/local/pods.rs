//! Two agents on one node, each in a network namespace of its own as Pods are, with one model server in a third: both steer at once, and
//! the end of one does not touch the other's flows.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Client, Namespace, Plan, Sender, TestAgent,
    agent::builtin_pool,
    eventually,
    model_server::{Framing, Lengths},
    sender::{Calls, Options, Waits},
};

use crate::{carried, is_exact};

const SOON: Duration = Duration::from_secs(20);

fn plan(framing: Framing, stream_id: u64) -> Plan {
    Plan { framing, size: 1 << 20, stream_id, chunks: Lengths::Fixed(3000), ..Plan::default() }
}

/// Exact responses on connections of `count` clients at once, carried by this path.
async fn is_carried(agent: &TestAgent, path: &str, count: u64) {
    let before = carried(agent, path);
    let addr = agent.addr;
    let clients = (0..count).map(|id| {
        tokio::spawn(async move {
            let mut client = Client::connect(addr).await.unwrap();
            for framing in [Framing::ContentLength, Framing::Chunked] {
                is_exact(&mut client, &plan(framing, id)).await;
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    eventually(SOON, || carried(agent, path) > before).await;
}

#[tokio::test]
async fn agents_in_two_pods_steer_at_once() {
    for (mode, path) in [(SteeringMode::Local, "local"), (SteeringMode::Ingress, "ingress")] {
        // Benchmark addresses (RFC 2544), which hide no real host; one set per process and mode.
        let set = std::process::id() % (1 << 12) * 2 + u32::from(path == "local");
        let host = |number| Ipv4Addr::from(0xc612_0000 + set * 16 + number);
        let server = Arc::new(Namespace::new().unwrap());
        let options = Options::new(Waits::EdgeTriggered, Calls::Send(8000));
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let endpoint = Sender::start(Options { listen, namespace: Some(Arc::clone(&server)), ..options }).unwrap();
        let mut pods = Vec::new();
        for number in [0, 1] {
            // Four networks of two addresses: each Pod has one with the clients and one with the model server.
            let [front, own, near, far] = [1, 2, 5, 6].map(|address| host(number * 8 + address));
            let name = format!("pp{set}-{number}");
            let pod = Namespace::connected(&name, &format!("{front}/30"), &format!("{own}/30")).unwrap();
            let ends =
                [(&pod, "back", &*format!("{near}/30")), (&server, &*format!("pod{number}"), &*format!("{far}/30"))];
            Namespace::join(ends).unwrap();
            let pool = builtin_pool(&[SocketAddr::from((far, endpoint.addr.port()))]);
            let agent =
                pod.run(|| TestAgent::start(pool, mode, |config| config.listen.address = SocketAddr::from((own, 0))));
            pods.push((agent.unwrap(), pod));
        }
        for _ in 0..3 {
            tokio::join!(is_carried(&pods[0].0, path, 4), is_carried(&pods[1].0, path, 4));
        }
        // One ends while the other carries.
        let (last, (first, _)) = (pods.pop().unwrap(), pods.pop().unwrap());
        let ended = tokio::task::spawn_blocking(move || drop(first));
        for _ in 0..3 {
            is_carried(&last.0, path, 4).await;
        }
        ended.await.unwrap();
        is_carried(&last.0, path, 4).await;
    }
}
