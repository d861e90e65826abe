//! Client, agent and endpoint in three network namespaces, joined by two cables.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Result;

use super::conditions::{CLIENT, Conditions, ENDPOINT, PLACES};
use crate::{
    ModelServer, Mounted, Namespace, Random,
    cable::{Cable, Carried},
    model_server::Options,
};

const TO_CLIENT: &str = "c0";
const TO_ENDPOINT: &str = "e0";
const PORT: u16 = 8080;

pub(super) struct World {
    pub(super) client: Namespace,
    pub(super) agent: Arc<Namespace>,
    pub(super) servers: Vec<ModelServer>,
    /// Where clients reach the agent.
    pub(super) front: SocketAddr,
    pub(super) bpffs: Mounted,
    cables: [Cable; 2],
    pub(super) endpoint: Namespace,
}

impl World {
    pub(super) fn new(conditions: &Conditions, random: &mut Random) -> Result<Self> {
        let places: [Namespace; PLACES] = [Namespace::new()?, Namespace::new()?, Namespace::new()?];
        for (place, tcp) in places.iter().zip(&conditions.tcp) {
            for (name, value) in tcp.sysctls() {
                place.set(&format!("net/ipv4/{name}"), &value)?;
            }
        }
        let mut cables = Vec::new();
        for (number, far, name) in [(0, CLIENT, TO_CLIENT), (1, ENDPOINT, TO_ENDPOINT)] {
            let ends = [(&places[far], name), (&places[1], name)];
            let own = Random::new(random.below(u64::MAX));
            cables.push(Cable::join(ends, conditions.offloads[number], conditions.faults[number], own)?);
            for (place, tcp, host) in [(&places[far], &conditions.tcp[far], 2), (&places[1], &conditions.tcp[1], 1)] {
                let net = if conditions.ipv6 { format!("fd00:{number}::") } else { format!("10.{number}.0.") };
                let (bits, no_dad) = if conditions.ipv6 { (64, " nodad") } else { (24, "") };
                place.ip(&format!("link set {name} mtu {}", conditions.mtus[number]))?;
                place.ip(&format!("addr add {net}{host}/{bits} dev {name}{no_dad}"))?;
                place.ip(&format!("link set {name} up"))?;
                if let Some(window) = tcp.window() {
                    let net = if conditions.ipv6 { net } else { format!("{net}0") };
                    place.ip(&format!("route replace {net}/{bits} dev {name} metric 1 window {window}"))?;
                }
            }
        }
        let [client, agent, endpoint] = places;
        let at = |four: &str, six: &str| -> Result<IpAddr> { Ok(if conditions.ipv6 { six } else { four }.parse()?) };
        let front = SocketAddr::new(at("10.0.0.1", "fd00:0::1")?, PORT);
        let listen = SocketAddr::new(at("10.1.0.2", "fd00:1::2")?, 0);
        let options = Options { listen, idle_close: None, keep_requests: false, ..Options::default() };
        let server = endpoint.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(ModelServer::start(options))
        })?;
        let cables = cables.try_into().map_err(|_| anyhow::anyhow!("two cables"))?;
        let (agent, servers, bpffs) = (Arc::new(agent), vec![server?], Mounted::bpffs()?);
        Ok(Self { client, agent, servers, front, bpffs, cables, endpoint })
    }

    /// Ends all faults.
    pub(super) fn calm(&self) {
        self.cables.iter().for_each(Cable::calm);
    }

    pub(super) fn carried(&self) -> Carried {
        let mut all = Carried::default();
        self.cables.iter().for_each(|cable| all.add(&cable.carried()));
        all
    }

    /// The agent's settings.
    pub(super) fn settings(&self) -> String {
        let place = self.bpffs.path().display();
        format!(
            "interfaces = \"{TO_CLIENT},{TO_ENDPOINT}\"\nbpffs = \"{place}\"\nat_stop = \"leave\"\n\
             [timeouts]\nconnect = \"60s\"\nhead = \"60s\"\nidle = \"60s\"\ndrain = \"1s\"\n"
        )
    }
}
