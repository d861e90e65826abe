//! A scripted DNS server over UDP: addresses of names with their TTLs, changeable while it runs. Other names do not exist.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};
use parking_lot::Mutex;
use tokio::net::UdpSocket;

use crate::own_runtime::OwnRuntime;

/// Dropping it stops the server and closes its port.
pub struct DnsServer {
    pub addr: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    _runtime: OwnRuntime,
}

#[derive(Default)]
struct Zone {
    /// By lowercase name without the final dot.
    names: HashMap<String, Answer>,
    silent: bool,
}

#[derive(Default)]
struct Answer {
    /// `None`: the name does not exist.
    addresses: Option<Vec<IpAddr>>,
    ttl: Duration,
    queries: u64,
}

impl DnsServer {
    /// Returns once the port is open. Runs on its own thread.
    pub async fn start() -> Result<Self> {
        let zone = Arc::<Mutex<Zone>>::default();
        let asked = Arc::clone(&zone);
        let begin = async move || {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let addr = socket.local_addr()?;
            tokio::spawn(serve(socket, asked));
            Ok(addr)
        };
        let (addr, runtime) = OwnRuntime::start("dns-server", begin).await?;
        Ok(Self { addr, zone, _runtime: runtime })
    }

    /// From now on `name` has these IPv4 or IPv6 addresses and this TTL (whole seconds). Without addresses it exists but has no
    /// records.
    pub fn set(&self, name: &str, addresses: &[IpAddr], ttl: Duration) {
        let mut zone = self.zone.lock();
        let answer = zone.names.entry(key(name)).or_default();
        (answer.addresses, answer.ttl) = (Some(addresses.to_vec()), ttl);
    }

    /// From now on `name` does not exist.
    pub fn remove(&self, name: &str) {
        self.zone.lock().names.entry(key(name)).or_default().addresses = None;
    }

    /// Whether queries are counted but not answered.
    pub fn silence(&self, silent: bool) {
        self.zone.lock().silent = silent;
    }

    /// Queries about `name` so far. A lookup sends one query per address family, and more if it retries.
    #[must_use]
    pub fn queries(&self, name: &str) -> u64 {
        self.zone.lock().names.get(&key(name)).map_or(0, |answer| answer.queries)
    }
}

fn key(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut datagram = [0; 1500];
    while let Ok((len, peer)) = socket.recv_from(&mut datagram).await {
        let reply = zone.lock().reply(&datagram[..len]);
        if let Some(reply) = reply {
            // The resolver may be gone.
            let _ = socket.send_to(&reply, peer).await;
        }
    }
}

impl Zone {
    fn reply(&mut self, datagram: &[u8]) -> Option<Vec<u8>> {
        let query = Message::from_vec(datagram).ok()?;
        let question = query.queries.first()?;
        let mut reply = Message::response(query.metadata.id, OpCode::Query);
        reply.metadata.recursion_available = true;
        reply.add_query(question.clone());
        // Unknown names are kept too, for their count.
        let answer = self.names.entry(key(&question.name().to_ascii())).or_default();
        answer.queries += 1;
        if self.silent {
            return None;
        }
        let Some(addresses) = &answer.addresses else {
            reply.metadata.response_code = ResponseCode::NXDomain;
            return reply.to_vec().ok();
        };
        let data = addresses.iter().filter_map(|&address| match (address, question.query_type()) {
            (IpAddr::V4(v4), RecordType::A) => Some(RData::A(v4.into())),
            (IpAddr::V6(v6), RecordType::AAAA) => Some(RData::AAAA(v6.into())),
            _ => None,
        });
        let ttl = u32::try_from(answer.ttl.as_secs()).unwrap_or(u32::MAX);
        reply.add_answers(data.map(|data| Record::from_rdata(question.name().clone(), ttl, data)));
        reply.to_vec().ok()
    }
}

#[cfg(test)]
mod tests {
    use penstock_agent::{config, parts::DnsResolver};

    use super::*;

    fn dns(server: &DnsServer) -> DnsResolver {
        let bounds = (Duration::from_secs(1), Duration::from_secs(60));
        let timeout = Duration::from_millis(500);
        DnsResolver::new(&config::Dns { servers: vec![server.addr], timeout, min_ttl: bounds.0, max_ttl: bounds.1 })
    }

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn name_resolves_to_latest_addresses() {
        let server = DnsServer::start().await.unwrap();
        let dns = dns(&server);
        server.set("Epp.test", &addresses(&["127.0.0.3", "127.0.0.2"]), Duration::from_secs(30));
        let answer = dns.resolve("epp.test").await.unwrap();
        assert_eq!(answer.addresses, addresses(&["127.0.0.2", "127.0.0.3"]));
        assert!(answer.holds > Duration::from_secs(28) && answer.holds <= Duration::from_secs(30), "{answer:?}");
        let asked = server.queries("epp.test");
        assert!(asked >= 1);
        server.set("epp.test.", &addresses(&["::1"]), Duration::from_secs(1));
        assert_eq!(dns.resolve("epp.test").await.unwrap().addresses, addresses(&["::1"]));
        assert!(server.queries("epp.test") > asked);
    }

    #[tokio::test]
    async fn unknown_name_and_silent_server_return_errors() {
        let server = DnsServer::start().await.unwrap();
        let dns = dns(&server);
        assert!(dns.resolve("nowhere.test").await.is_err());
        assert!(server.queries("nowhere.test") >= 1);
        server.set("epp.test", &[], Duration::from_secs(30));
        assert!(dns.resolve("epp.test").await.is_err());
        server.set("epp.test", &addresses(&["127.0.0.2"]), Duration::from_secs(30));
        server.silence(true);
        assert!(dns.resolve("epp.test").await.is_err());
        server.silence(false);
        dns.resolve("epp.test").await.unwrap();
        server.remove("epp.test");
        assert!(dns.resolve("epp.test").await.is_err());
    }
}
