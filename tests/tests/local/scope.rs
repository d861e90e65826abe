//! Which sockets the agent touches: only those it has connected to, in any network namespace and with any address family.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData, loaded_maps};
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, Client, ModelServer, Namespace, Plan, Sender, TestAgent,
    agent::builtin_pool,
    eventually,
    model_server::{self, Fault, FaultKind, Framing, Lengths, Pauses},
    sender::{Calls, Options, Waits},
};
use socket2::{Domain, SockRef, Socket, Type};

use crate::{carried, is_exact, stops};

const SOON: Duration = Duration::from_secs(10);

fn plan(framing: Framing, stream_id: u64) -> Plan {
    Plan { framing, size: 1 << 20, stream_id, chunks: Lengths::Fixed(3000), ..Plan::default() }
}

fn sender(listen: SocketAddr, namespace: Option<&Arc<Namespace>>) -> Sender {
    let options = Options::new(Waits::EdgeTriggered, Calls::Send(8000));
    Sender::start(Options { listen, namespace: namespace.cloned(), ..options }).unwrap()
}

/// Asserts two exact responses on one connection, carried by the path `local`.
async fn is_carried(agent: &TestAgent, id: u64) {
    let before = carried(agent, "local");
    let mut client = Client::connect(agent.addr).await.unwrap();
    for framing in [Framing::ContentLength, Framing::Chunked] {
        is_exact(&mut client, &plan(framing, id)).await;
    }
    eventually(SOON, || carried(agent, "local") > before).await;
}

/// Sockets that any agent on this machine has in its maps by cookie: its own and endpoints'.
fn known() -> HashSet<u64> {
    let mut cookies = HashSet::new();
    for info in loaded_maps().filter_map(Result::ok) {
        if !matches!(info.name_as_str(), Some("INDEX" | "LOCAL_INDEX")) {
            continue;
        }
        // Other tests' agents start and end meanwhile.
        let Ok(data) = MapData::from_id(info.id()) else { continue };
        let map: HashMap<MapData, u64, u32> = Map::HashMap(data).try_into().unwrap();
        cookies.extend(map.keys().filter_map(Result::ok));
    }
    cookies
}

/// A connection with the same addresses and ports in a third namespace is left alone.
#[tokio::test]
async fn endpoint_in_other_network_namespace_is_steered() {
    // Benchmark addresses (RFC 2544), which hide no real host; one pair per process.
    let pair = std::process::id() % (1 << 14);
    let [here, there] = [1, 2].map(|host| Ipv4Addr::from(0xc612_0000 + pair * 4 + host));
    let name = format!("penstock{pair}");
    let connected = Arc::new(Namespace::connected(&name, &format!("{here}/30"), &format!("{there}/30")).unwrap());
    let endpoint = sender(SocketAddr::from((there, 0)), Some(&connected));
    let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Local, |config| {
        config.listen.workers = 1;
        config.timeouts.endpoint_keep_alive = Duration::from_secs(60);
    });
    is_carried(&agent, 1).await;
    let [connection] = endpoint.accepted()[..] else { panic!("{:?}", endpoint.accepted()) };
    assert_eq!(connection.peer.ip(), IpAddr::V4(here));
    assert!(known().contains(&connection.cookie));

    let other = Namespace::new().unwrap();
    for address in [here, there] {
        other.ip(&format!("addr add {address}/32 dev lo")).unwrap();
    }
    let twin = other.run(|| connect(connection.peer, endpoint.addr)).unwrap();
    let cookies = twin.each_ref().map(|socket| SockRef::from(socket).cookie().unwrap());
    assert_eq!(twin[0].local_addr().unwrap(), connection.peer);
    // Both exchange data at once, on connections with identical addresses and ports.
    let talk = std::thread::spawn(move || {
        for id in 0..50 {
            talk(&twin[0], &twin[1], id);
            talk(&twin[1], &twin[0], id);
        }
        twin
    });
    for id in 2..5 {
        is_carried(&agent, id).await;
    }
    let twin = talk.join().unwrap();
    let known = known();
    assert!(cookies.iter().all(|cookie| !known.contains(cookie)));
    assert!(known.contains(&connection.cookie), "the connection of the same names is still the agent's");
    drop(twin);
}

/// Opens a connection from `from` to `to` and returns both ends.
fn connect(from: SocketAddr, to: SocketAddr) -> [TcpStream; 2] {
    let listener = TcpListener::bind(to).unwrap();
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, None).unwrap();
    socket.bind(&from.into()).unwrap();
    socket.connect(&to.into()).unwrap();
    [socket.into(), listener.accept().unwrap().0]
}

fn talk(mut from: &TcpStream, mut to: &TcpStream, id: u64) {
    let bytes = Alphabet::Binary.bytes(id, 0, 20_000);
    from.write_all(&bytes).unwrap();
    let mut read = vec![0; bytes.len()];
    to.read_exact(&mut read).unwrap();
    assert!(read == bytes);
}

#[tokio::test]
async fn ipv6_and_dual_stack_listeners_are_steered() {
    let six = sender(SocketAddr::from((Ipv6Addr::LOCALHOST, 0)), None);
    let agent = TestAgent::start(builtin_pool(&[six.addr]), SteeringMode::Local, |config| {
        config.listen.address = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    });
    is_carried(&agent, 1).await;

    // An IPv6 socket whose packets are IPv4.
    let both = sender(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), None);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, both.addr.port()));
    let agent = TestAgent::start(builtin_pool(&[address]), SteeringMode::Local, |_| {});
    is_carried(&agent, 2).await;
    let IpAddr::V6(peer) = both.accepted()[0].peer.ip() else { panic!("{:?}", both.accepted()) };
    assert!(peer.to_ipv4_mapped().is_some());
}

#[tokio::test]
async fn two_agents_with_one_endpoint_both_steer() {
    let endpoint = sender(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None);
    let agents = [(); 2].map(|()| TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Local, |_| {}));
    for round in 0..3 {
        tokio::join!(is_carried(&agents[0], 2 * round), is_carried(&agents[1], 2 * round + 1));
    }
}

/// The inner agent and its kernel take turns writing to its client, the outer agent: every byte must be counted, even before
/// anything is steered.
#[tokio::test]
async fn agent_in_front_of_agent_delivers_exact_bytes() {
    for mode in [SteeringMode::Local, SteeringMode::Auto] {
        let endpoint = ModelServer::start(model_server::Options::default()).await.unwrap();
        let inner = TestAgent::start(builtin_pool(&[endpoint.addr]), SteeringMode::Auto, |_| {});
        let outer = TestAgent::start(builtin_pool(&[inner.addr]), mode, |config| {
            (config.listen.workers, config.steering.min_bytes) = (1, 0);
        });
        let mut client = Client::connect(outer.addr).await.unwrap();
        for id in 0..4 {
            // Too small to be steered, with time for the outer agent to wait for the rest.
            let fault = Some(Fault { after: 2000, kind: FaultKind::StallMs(30) });
            is_exact(&mut client, &Plan { size: 4000, stream_id: id, fault, ..Plan::default() }).await;
            let pauses = Some(Pauses { seed: id, every: 4, up_to_us: 2000 });
            let large = Plan { writes: Lengths::Fixed(8000), pauses, ..plan(Framing::Chunked, id) };
            is_exact(&mut client, &large).await;
        }
        eventually(SOON, || outer.count("penstock_requests_total", &[r#"reason="ok""#]) == 8).await;
        assert!(carried(&inner, "local") > 0, "{mode:?}");
        assert_eq!((carried(&outer, "local"), stops(&outer, "account")), (0, 0), "{mode:?}");
        assert_eq!(carried(&outer, "ingress") > 0, mode == SteeringMode::Auto, "{mode:?}");
    }
}

/// Connections and clients without a free slot or map entry are relayed.
#[tokio::test]
async fn full_maps_and_slot_tables_relay() {
    // In auto, a client on the path ingress may take the last place that the next needs on the path local.
    let cases: [(u32, SteeringMode, &[&str]); 4] = [
        (1, SteeringMode::Local, &["local"]),
        (2, SteeringMode::Local, &["local"]),
        (1, SteeringMode::Ingress, &["ingress"]),
        (2, SteeringMode::Auto, &["local", "ingress"]),
    ];
    for (max_flows, mode, paths) in cases {
        let endpoint = sender(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None);
        let agent = TestAgent::start(builtin_pool(&[endpoint.addr]), mode, |config| {
            config.steering.max_flows = max_flows;
            // Each connection requests a new slot.
            config.timeouts.endpoint_keep_alive = Duration::from_millis(1);
        });
        let clients = (0..12).map(|id| {
            let addr = agent.addr;
            tokio::spawn(async move {
                let mut client = Client::connect(addr).await.unwrap();
                is_exact(&mut client, &plan(Framing::ContentLength, id)).await;
                is_exact(&mut client, &plan(Framing::Chunked, id)).await;
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        eventually(SOON, || agent.count("penstock_requests_total", &[r#"reason="ok""#]) == 24).await;
        assert!(agent.count("penstock_flows_total", &[]) == 24 && carried(&agent, "relay") > 0);
        // A single client gets a place: released ones are free again within two seconds.
        let by_kernel = || paths.iter().map(|path| carried(&agent, path)).sum::<u64>();
        let begin = Instant::now();
        while by_kernel() == 0 {
            assert!(begin.elapsed() < 2 * SOON, "{}", agent.agent.metrics().encode());
            let none = |gauge| agent.metric(gauge, &[]) == 0.0;
            eventually(SOON, || none("penstock_slots_in_use") && none("penstock_client_connections")).await;
            let mut client = Client::connect(agent.addr).await.unwrap();
            is_exact(&mut client, &plan(Framing::ContentLength, 1)).await;
        }
        println!("{max_flows} {mode:?}: {paths:?} {}, relay {}", by_kernel(), carried(&agent, "relay"));
    }
}
