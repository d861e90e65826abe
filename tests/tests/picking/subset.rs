//! E9: the subset of a pool that requests should stay in, as sent to a picker and as followed by the built-in one.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use penstock_agent::config::{
    self, Config, EmptySubset, FailureMode, ListedEndpoint, Locality, Pool, SteeringMode, Subset,
};
use penstock_agent::epp_server::{self, EppServerConfig, EppServerLimits, EppServerTls};
use penstock_proto::prost_types::value::Kind;
use penstock_tests::agent::{TestAgent, builtin_pool, epp_pool};
use penstock_tests::client::Client;
use penstock_tests::model_server::Options;
use penstock_tests::scripted_epp::{Answering, Production, Script, ScriptedEpp, StreamEnd, reply};
use penstock_tests::stage::{echo, json};
use penstock_tests::{ModelServer, Refusing, eventually};
use tokio::net::TcpListener;

use crate::SOON;

/// Three servers: one on the agent's node, one in its zone, one elsewhere.
struct World {
    near: ModelServer,
    zone: ModelServer,
    far: ModelServer,
}

impl World {
    async fn new() -> Self {
        let [near, zone, far] = [(); 3].map(|()| ModelServer::start(Options::default()));
        Self { near: near.await.unwrap(), zone: zone.await.unwrap(), far: far.await.unwrap() }
    }

    fn addresses(&self) -> [SocketAddr; 3] {
        [self.near.addr, self.zone.addr, self.far.addr]
    }

    fn endpoints(&self) -> Vec<ListedEndpoint> {
        let at = |address: SocketAddr, node: &str, zone: &str| ListedEndpoint {
            node: Some(node.to_owned()),
            zone: Some(zone.to_owned()),
            ..address.into()
        };
        vec![at(self.near.addr, "n1", "a"), at(self.zone.addr, "n2", "a"), at(self.far.addr, "n3", "b")]
    }

    fn requests(&self) -> [u64; 3] {
        [&self.near, &self.zone, &self.far].map(ModelServer::requests)
    }
}

fn prefer(localities: &[Locality], empty: EmptySubset) -> Subset {
    Subset { prefer: localities.to_vec(), endpoints: vec![], empty }
}

const NODE_THEN_ZONE: [Locality; 2] = [Locality::Node, Locality::Zone];

async fn agent(pool: Pool, endpoints: Vec<ListedEndpoint>, subset: Subset) -> (TestAgent, Client) {
    let pool = Pool { endpoints, subset, ..pool };
    let agent = TestAgent::start(pool, SteeringMode::Off, |config: &mut Config| {
        config.node = config::Node { name: Some("n1".into()), zone: Some("a".into()) };
    });
    let client = Client::connect(agent.addr).await.unwrap();
    (agent, client)
}

async fn with_epp(
    script: impl Script,
    endpoints: Vec<ListedEndpoint>,
    subset: Subset,
) -> (ScriptedEpp, TestAgent, Client) {
    let epp = ScriptedEpp::start(script).await.unwrap();
    let (agent, client) = agent(epp_pool(&[], epp.addr, FailureMode::Closed), endpoints, subset).await;
    (epp, agent, client)
}

fn texts(addresses: &[SocketAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

/// The subset in a message, which must be a list.
fn hint(message: &penstock_proto::ext_proc::ProcessingRequest) -> Option<Vec<String>> {
    let metadata = &message.metadata_context.as_ref()?.filter_metadata;
    let hint = metadata.get("envoy.lb.subset_hint")?.fields.get("x-gateway-destination-endpoint-subset")?;
    let Some(Kind::ListValue(list)) = &hint.kind else { panic!("{hint:?}") };
    let text = |value: &penstock_proto::prost_types::Value| match &value.kind {
        Some(Kind::StringValue(text)) => text.clone(),
        other => panic!("{other:?}"),
    };
    Some(list.values.iter().map(text).collect())
}

#[tokio::test]
async fn subset_hint_is_a_list_on_every_message() {
    let world = World::new().await;
    let (epp, _agent, mut client) =
        with_epp(Production::new(&world.addresses()), world.endpoints(), prefer(&NODE_THEN_ZONE, EmptySubset::All))
            .await;
    let response = client.request(&echo(json("m", 300_000))).await.unwrap();
    assert_eq!(response.served_by(), Some(world.near.addr));
    eventually(SOON, || epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
    let stream = &epp.streams()[0];
    assert!(stream.messages.len() > 5, "{:?}", stream.kinds());
    for message in &stream.messages {
        assert_eq!(hint(message), Some(texts(&[world.near.addr])));
    }
}

/// The endpoints, the preference, the hint, and the server that responds.
type Row<'a> = (Vec<ListedEndpoint>, &'a [Locality], Option<Vec<SocketAddr>>, SocketAddr);

#[tokio::test]
async fn subset_hint_is_nearest_nonempty_group() {
    let world = World::new().await;
    let [near, zone, far] = world.addresses();
    let all = world.endpoints();
    let drained: Vec<ListedEndpoint> =
        all.iter().map(|endpoint| ListedEndpoint { draining: endpoint.address == near, ..endpoint.clone() }).collect();
    let rows: [Row<'_>; 5] = [
        (all.clone(), &NODE_THEN_ZONE, Some(vec![near]), near),
        (all.clone(), &[Locality::Zone], Some(vec![near, zone]), near),
        (drained, &NODE_THEN_ZONE, Some(vec![zone]), zone),
        (all[1..].to_vec(), &[Locality::Node], None, zone),
        (all[2..].to_vec(), &NODE_THEN_ZONE, None, far),
    ];
    for (endpoints, localities, hint, served) in rows {
        let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
        let subset = prefer(localities, EmptySubset::All);
        let (epp, agent, mut client) = with_epp(Production::new(&addresses), endpoints, subset).await;
        let response = client.request(&echo(json("m", 100))).await.unwrap();
        assert_eq!(epp.streams()[0].subset(), hint.as_deref().map(texts), "{localities:?} of {addresses:?}");
        assert_eq!(response.served_by(), Some(served));
        assert_eq!(agent.count("penstock_epp_outside_subset_total", &[]), 0);
    }
}

#[tokio::test]
async fn failed_endpoint_widens_subset() {
    let world = World::new().await;
    let dead = Refusing::new().unwrap();
    let mut endpoints = world.endpoints();
    endpoints[0].address = dead.addr;
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
    let (epp, agent, mut client) =
        with_epp(Production::new(&addresses), endpoints, prefer(&NODE_THEN_ZONE, EmptySubset::All)).await;
    for _ in 0..4 {
        assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().served_by(), Some(world.zone.addr));
    }
    assert_eq!(agent.count("penstock_ejections_total", &[]), 1);
    // Each of the first three requests is picked twice, and then the endpoint is ejected.
    let (node, zone) = (Some(texts(&[dead.addr])), Some(texts(&[world.zone.addr])));
    let hints: Vec<_> = epp.streams().iter().map(penstock_tests::scripted_epp::StreamRecord::subset).collect();
    assert_eq!(hints, [&node, &zone, &node, &zone, &node, &zone, &zone].map(Clone::clone));
}

#[tokio::test]
async fn explicit_subset_is_the_hint() {
    let world = World::new().await;
    let [_, zone, far] = world.addresses();
    let elsewhere = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), 8000));
    let subset = Subset { prefer: vec![], endpoints: vec![far, elsewhere, zone], empty: EmptySubset::All };
    let (epp, _agent, mut client) = with_epp(Production::new(&world.addresses()), world.endpoints(), subset).await;
    for _ in 0..4 {
        assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 200);
    }
    assert_eq!(epp.streams()[0].subset(), Some(texts(&[far, zone])));
    assert_eq!(world.requests(), [0, 2, 2]);
}

/// The picker gets the empty list and replies itself.
#[tokio::test]
async fn empty_subset_reaches_picker_as_empty_list() {
    let world = World::new().await;
    let endpoints = world.endpoints()[1..].to_vec();
    let subset = prefer(&[Locality::Node], EmptySubset::Fail);
    let (epp, agent, mut client) = with_epp(Production::new(&world.addresses()), endpoints, subset).await;
    let response = client.request(&echo(json("m", 100))).await.unwrap();
    assert_eq!((response.status(), response.text().contains("no candidate pods")), (503, true));
    assert_eq!(epp.streams()[0].subset(), Some(vec![]));
    assert_eq!(world.requests(), [0, 0, 0]);
    let reason = [r#"status="503""#, r#"reason="picker_reply""#];
    eventually(SOON, || agent.count("penstock_requests_total", &reason) == 1).await;
}

/// The picker decides.
#[tokio::test]
async fn pick_outside_subset_is_followed_and_counted() {
    let world = World::new().await;
    let named = format!("{},{}", world.far.addr, world.near.addr);
    let script = Answering::new(move |_| vec![reply::pick(&named, &[])]);
    let (_epp, agent, mut client) =
        with_epp(script, world.endpoints(), prefer(&NODE_THEN_ZONE, EmptySubset::Fail)).await;
    assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().served_by(), Some(world.far.addr));
    assert_eq!(agent.count("penstock_epp_outside_subset_total", &[r#"pool="default""#]), 1);
}

/// Also with a failed picker in a pool that fails open.
#[tokio::test]
async fn builtin_picker_stays_within_subset() {
    let refusing = Refusing::new().unwrap();
    for pool in [builtin_pool(&[]), epp_pool(&[], refusing.addr, FailureMode::Open)] {
        let world = World::new().await;
        let near = agent(pool.clone(), world.endpoints(), prefer(&NODE_THEN_ZONE, EmptySubset::All)).await;
        let zone = agent(pool.clone(), world.endpoints(), prefer(&[Locality::Zone], EmptySubset::All)).await;
        let away =
            agent(pool.clone(), world.endpoints()[2..].to_vec(), prefer(&NODE_THEN_ZONE, EmptySubset::All)).await;
        for ((_agent, mut client), more) in [(near, [4, 0, 0]), (zone, [2, 2, 0]), (away, [0, 0, 4])] {
            let before = world.requests();
            for _ in 0..4 {
                assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 200);
            }
            assert_eq!(world.requests(), std::array::from_fn(|at| before[at] + more[at]));
        }
        let empty = prefer(&[Locality::Node], EmptySubset::Fail);
        let (_agent, mut client) = agent(pool, world.endpoints()[1..].to_vec(), empty).await;
        let response = client.request(&echo(json("m", 100))).await.unwrap();
        assert_eq!((response.status(), response.error_code().as_str()), (503, "no_endpoint"));
    }
}

/// As served by `penstock epp`.
#[tokio::test]
async fn builtin_epp_server_stays_within_subset() {
    let world = World::new().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = EppServerConfig {
        listen: address,
        endpoints: world.addresses().into(),
        tls: EppServerTls::Off,
        max_inflight: None,
        delay: None,
        max_body: 1 << 20,
        session_headers: vec![],
        client_ca: None,
        limits: EppServerLimits::default(),
    };
    let server = tokio::spawn(epp_server::serve(served, listener, std::future::pending()));
    let pool = epp_pool(&[], address, FailureMode::Closed);
    let subset = prefer(&[Locality::Zone], EmptySubset::Fail);
    let (_near, mut client) = agent(pool.clone(), world.endpoints(), subset.clone()).await;
    for _ in 0..4 {
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), 200);
    }
    let [near, zone, far] = world.requests();
    assert_eq!((near + zone, far), (4, 0));
    let (_away, mut client) = agent(pool, world.endpoints()[2..].to_vec(), subset).await;
    assert_eq!(client.request(&echo(json("m", 100))).await.unwrap().status(), 503);
    assert_eq!(world.far.connections_accepted(), 0);
    server.abort();
}

/// A subset of a thousand endpoints is sent whole, and requests do not wait for it.
#[tokio::test]
async fn subset_of_thousand_endpoints_does_not_delay_requests() {
    let world = World::new().await;
    let mut endpoints = world.endpoints();
    let many = (0..1000_u16).map(|n| ListedEndpoint {
        zone: Some("a".into()),
        ..SocketAddr::from((Ipv4Addr::new(10, 1, (n >> 8) as u8, n as u8), 8000)).into()
    });
    endpoints.extend(many);
    let near = world.near.addr.to_string();
    let script = Answering::new(move |_| vec![reply::pick(&near, &[])]);
    let (epp, _agent, mut client) = with_epp(script, endpoints, prefer(&[Locality::Zone], EmptySubset::All)).await;
    let begin = std::time::Instant::now();
    for _ in 0..50 {
        assert_eq!(client.request(&echo(json("m", 1000))).await.unwrap().status(), 200);
    }
    assert_eq!(epp.streams()[49].subset().unwrap().len(), 1002);
    println!("{:?} a request", begin.elapsed() / 50);
    assert!(begin.elapsed() < Duration::from_secs(10));
}
