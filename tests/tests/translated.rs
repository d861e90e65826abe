//! Path `wire` where addresses are translated: outside of the agent's network namespace, which the path does not notice, and inside of
//! it, where the response stays with the relay. All with connection tracking that drops what it finds invalid, and strict `rp_filter`.
//!
//! Five namespaces in a row, each joined to the next: client, near router, agent, far router, endpoint. Needs `ip` and `nft`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use penstock_agent::config::{Interfaces, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Namespace, Plan, TestAgent,
    agent::builtin_pool,
    client::Pace,
    eventually,
    model_server::{After, Fault, FaultKind, Framing, Lengths, Options},
};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(30);
const STREAMS: u64 = 10;
const SIZE: u64 = 400 << 10;
/// Addresses that only rules know, as of a Service.
const SERVICE: [&str; 2] = ["10.96.0.10", "fd96::10"];

/// The version of IP.
#[derive(Clone, Copy, Debug)]
enum Family {
    Four,
    Six,
}

impl Family {
    /// The host on this link; links are counted from the client.
    fn host(self, link: usize, host: usize) -> String {
        match self {
            Self::Four => format!("10.9.{link}.{host}"),
            Self::Six => format!("fd09:{link}::{host}"),
        }
    }

    fn bits(self) -> usize {
        if matches!(self, Self::Four) { 24 } else { 64 }
    }

    fn service(self) -> &'static str {
        SERVICE[self as usize]
    }

    /// The word for an address in rules, and an address with its port there.
    fn word(self) -> &'static str {
        if matches!(self, Self::Four) { "ip" } else { "ip6" }
    }

    fn with_port(self, address: &str, port: u16) -> String {
        if matches!(self, Self::Four) { format!("{address}:{port}") } else { format!("[{address}]:{port}") }
    }
}

/// Five namespaces, of which 2 is the agent's.
struct Row {
    places: Vec<Arc<Namespace>>,
    family: Family,
    server: ModelServer,
}

const CLIENT: usize = 0;
const NEAR: usize = 1;
const AGENT: usize = 2;
const FAR: usize = 3;
const ENDPOINT: usize = 4;

impl Row {
    fn new(family: Family) -> Result<Self> {
        let places: Vec<_> = (0..5).map(|_| Namespace::new().map(Arc::new)).collect::<Result<_>>()?;
        for link in 0..4 {
            let [left, right] = [1, 2].map(|host| format!("{}/{}", family.host(link, host), family.bits()));
            Namespace::join([(&places[link], "r0", &left), (&places[link + 1], "l0", &right)])?;
        }
        for (place, at) in places.iter().zip(0..) {
            for name in ["all", "default", "l0", "r0"].iter().skip(if at == CLIENT || at == ENDPOINT { 4 } else { 0 }) {
                place.set(&format!("net/ipv4/conf/{name}/rp_filter"), "1")?;
            }
            place.set("net/ipv4/ip_forward", "1")?;
            place.set("net/ipv6/conf/all/forwarding", "1")?;
            place.set("net/netfilter/nf_conntrack_tcp_be_liberal", "0")?;
            // Both ends of the row are reached through the neighbours.
            for link in (0..4).filter(|link| *link != at && link + 1 != at) {
                let via = if link < at { family.host(at - 1, 1) } else { family.host(at, 2) };
                place.ip(&format!("route add {}/{} via {via}", family.host(link, 0), family.bits()))?;
            }
        }
        for at in [NEAR, AGENT, FAR] {
            let hooks = [("prerouting", -150), ("output", -150)];
            let chains = hooks.map(|(hook, priority)| {
                format!(
                    "chain {hook} {{ type filter hook {hook} priority {priority}; policy accept; \
                     ct state invalid counter drop; }}"
                )
            });
            places[at].nft(&format!("table inet tracked {{\n{}\n}}", chains.join("\n")))?;
        }
        let listen: SocketAddr = family.with_port(&family.host(3, 2), 0).parse()?;
        let options = Options { listen, idle_close: None, ..Options::default() };
        let server = places[ENDPOINT].run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(ModelServer::start(options))
        })?;
        Ok(Self { places, family, server: server? })
    }

    /// Rules of a chain for NAT in one place.
    fn translate(&self, at: usize, chains: &[(&str, &str)]) -> Result<()> {
        let chains = chains.iter().map(|(hook, rule)| {
            let priority = if matches!(*hook, "prerouting" | "output") { -100 } else { 100 };
            format!("chain {hook} {{ type nat hook {hook} priority {priority}; {rule}; }}")
        });
        let family = self.family.word();
        self.places[at].nft(&format!("table {family} nat {{\n{}\n}}", chains.collect::<Vec<_>>().join("\n")))?;
        Ok(())
    }

    /// An agent in its place over an endpoint at this address.
    fn agent(&self, endpoint: SocketAddr) -> Result<TestAgent> {
        let front: SocketAddr = self.family.with_port(&self.family.host(1, 2), 8080).parse()?;
        self.places[AGENT].run(|| {
            TestAgent::try_start(builtin_pool(&[endpoint]), SteeringMode::Wire, |config| {
                config.listen.address = front;
                config.timeouts.connect = Some(SOON);
                config.steering.interfaces = Interfaces::Named(vec!["l0".to_owned(), "r0".to_owned()]);
            })
        })?
    }

    /// Packets that were dropped because connection tracking found them invalid.
    fn invalid(&self, at: usize) -> Result<u64> {
        let listed = self.places[at].nft("list table inet tracked")?;
        let counts = listed.split("counter packets ").skip(1).filter_map(|rest| rest.split(' ').next());
        Ok(counts.filter_map(|count| count.parse::<u64>().ok()).sum())
    }

    /// The connections that are tracked in the agent's namespace.
    fn tracked(&self) -> Vec<String> {
        let read = || std::fs::read_to_string("/proc/thread-self/net/nf_conntrack");
        let table = self.places[AGENT].run(read).unwrap().unwrap();
        table.lines().map(str::to_owned).collect()
    }

    /// A stream through the agent, compared byte by byte.
    async fn stream(&self, to: SocketAddr, number: u64) -> Result<()> {
        let place = Arc::clone(&self.places[CLIENT]);
        let connect = move || place.run(|| std::net::TcpStream::connect_timeout(&to, SOON));
        let socket = tokio::task::spawn_blocking(connect).await??.with_context(|| format!("connecting to {to}"))?;
        socket.set_nonblocking(true)?;
        let mut client = Client::over(TcpStream::from_std(socket)?, to);
        client.patience = SOON;
        let plan = plan(number);
        client.send(&plan.request().header("accept", "text/event-stream")).await?;
        assert_eq!(client.head().await?.status, 200);
        let mut checker = plan.checker();
        let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await?;
        assert_eq!((read.end, checker.offset()), (BodyEnd::Complete, SIZE));
        Ok(())
    }

    async fn streams(&self, to: SocketAddr) -> Result<()> {
        let streams = (0..STREAMS).map(|number| self.stream(to, number));
        futures_util::future::try_join_all(streams).await?;
        Ok(())
    }
}

/// With a pause after its beginning in which a flow can begin.
fn plan(number: u64) -> Plan {
    Plan {
        framing: Framing::Chunked,
        size: SIZE,
        stream_id: number,
        chunks: Lengths::Fixed(300),
        writes: Lengths::Fixed(1200),
        fault: Some(Fault { after: 20 << 10, kind: FaultKind::StallMs(400) }),
        after: After::Close,
        ..Plan::default()
    }
}

fn flows(agent: &TestAgent, path: &str, reason: &str) -> u64 {
    agent.count("penstock_flows_total", &[&format!("path=\"{path}\""), &format!("reason=\"{reason}\"")])
}

#[tokio::test]
async fn translation_outside_of_the_agents_namespace_is_not_noticed() {
    for family in [Family::Four, Family::Six] {
        let row = Row::new(family).unwrap();
        let (word, service) = (family.word(), family.service());
        // Clients use a Service address, and the agent sees the router's. The endpoint has another address for the agent.
        let to_agent = family.with_port(&family.host(1, 2), 8080);
        row.places[CLIENT].ip(&format!("route add {service} via {}", family.host(0, 2))).unwrap();
        let into = format!("{word} daddr {service} tcp dport 80 dnat to {to_agent}");
        row.translate(NEAR, &[("prerouting", &into), ("postrouting", "oifname \"r0\" masquerade")]).unwrap();
        let endpoint = family.with_port(&family.host(3, 2), row.server.addr.port());
        let outside = if matches!(family, Family::Four) { "10.77.0.7" } else { "fd77::7" };
        row.places[AGENT].ip(&format!("route add {outside} via {}", family.host(2, 2))).unwrap();
        let into = format!("{word} daddr {outside} tcp dport 81 dnat to {endpoint}");
        row.translate(FAR, &[("prerouting", &into), ("postrouting", "oifname \"r0\" masquerade")]).unwrap();

        let agent = row.agent(family.with_port(outside, 81).parse().unwrap()).unwrap();
        row.streams(family.with_port(service, 80).parse().unwrap()).await.unwrap();
        eventually(SOON, || flows(&agent, "wire", "forced") == STREAMS).await;
        for at in [NEAR, AGENT, FAR] {
            assert_eq!(row.invalid(at).unwrap(), 0, "{family:?}: place {at} dropped packets");
        }
        assert_eq!(row.server.aborted(), 0);
    }
}

/// Streams over addresses that the agent's namespace translates: exact, relayed, and for the reason that says so.
async fn is_relayed(row: &Row, agent: &TestAgent, to: &str) {
    row.streams(to.parse().unwrap()).await.unwrap();
    eventually(SOON, || flows(agent, "relay", "nat") == STREAMS).await;
    assert_eq!(agent.count("penstock_body_bytes_total", &["path=\"wire\""]), 0, "{:?}", row.family);
    for at in [NEAR, AGENT, FAR] {
        assert_eq!(row.invalid(at).unwrap(), 0, "{:?}: place {at} dropped packets", row.family);
    }
    assert_eq!(row.server.aborted(), 0);
}

#[tokio::test]
async fn endpoints_that_the_agents_namespace_translates_are_relayed() {
    for family in [Family::Four, Family::Six] {
        let row = Row::new(family).unwrap();
        let (word, service) = (family.word(), family.service());
        // As a Service's address on a node.
        let endpoint = family.with_port(&family.host(3, 2), row.server.addr.port());
        row.places[AGENT].ip(&format!("route add {service} via {}", family.host(2, 2))).unwrap();
        row.translate(AGENT, &[("output", &format!("{word} daddr {service} tcp dport 80 dnat to {endpoint}"))])
            .unwrap();
        let agent = row.agent(family.with_port(service, 80).parse().unwrap()).unwrap();
        is_relayed(&row, &agent, &family.with_port(&family.host(1, 2), 8080)).await;
    }
}

#[tokio::test]
async fn sources_that_the_agents_namespace_translates_are_relayed() {
    for family in [Family::Four, Family::Six] {
        let row = Row::new(family).unwrap();
        let (other, bits) = (family.host(2, 9), family.bits());
        let no_dad = if matches!(family, Family::Six) { "nodad " } else { "" };
        // No connection chooses it as its source.
        row.places[AGENT].ip(&format!("addr add {other}/{bits} dev r0 {no_dad}preferred_lft 0")).unwrap();
        row.translate(AGENT, &[("postrouting", &format!("oifname \"r0\" snat to {other}"))]).unwrap();
        let agent = row.agent(row.server.addr).unwrap();
        is_relayed(&row, &agent, &family.with_port(&family.host(1, 2), 8080)).await;
    }
}

#[tokio::test]
async fn clients_that_the_agents_namespace_translates_are_relayed() {
    for family in [Family::Four, Family::Six] {
        let row = Row::new(family).unwrap();
        // As a port of the host for a container.
        row.translate(AGENT, &[("prerouting", "tcp dport 80 redirect to :8080")]).unwrap();
        let agent = row.agent(row.server.addr).unwrap();
        is_relayed(&row, &agent, &family.with_port(&family.host(1, 2), 80)).await;
    }
}

#[tokio::test]
async fn tracked_connections_end_with_their_flows() {
    const ROUNDS: u64 = 10;
    for family in [Family::Four, Family::Six] {
        let row = Row::new(family).unwrap();
        // Entries of connections that are over are to go while the test waits.
        for state in ["close", "time_wait", "last_ack", "fin_wait", "close_wait"] {
            row.places[AGENT].set(&format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"), "1").unwrap();
        }
        let agent = row.agent(row.server.addr).unwrap();
        let to = family.with_port(&family.host(1, 2), 8080).parse().unwrap();
        for _ in 0..ROUNDS {
            let streams = row.streams(to);
            tokio::pin!(streams);
            let (mut is_over, mut most) = (false, 0);
            while !is_over {
                is_over = tokio::select! {
                    done = &mut streams => done.map(|()| true).unwrap(),
                    () = tokio::time::sleep(Duration::from_millis(100)) => false,
                };
                most = most.max(row.tracked().len());
            }
            assert!(most >= STREAMS as usize, "connections are not tracked");
        }
        eventually(SOON, || flows(&agent, "wire", "forced") == ROUNDS * STREAMS).await;
        let deadline = std::time::Instant::now() + SOON;
        while !row.tracked().is_empty() {
            assert!(std::time::Instant::now() < deadline, "{:#?}", row.tracked());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
