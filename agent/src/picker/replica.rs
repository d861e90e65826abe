//! The replicas of one pool's EPP: which there are and how they are. Workers ask it whom to ask; what looks after it (`tend`)
//! looks names up and checks health, once for all workers.
//!
//! Replicas have an order, that of the configuration and then of the addresses of each name, which is the same for every
//! agent. The best is the first of those that are best off, so that as long as one serves, it gets everything: with leader
//! election that is the leader, and without it the state of one EPP (prefixes, load) stays of use. An EPP without a replica
//! that serves is asked all the same: what a replica says of its health decides who is asked first, not whether.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use http::uri::Authority;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::sync::{Notify, watch};

use super::{error::PickError, tls::Tls};
use crate::config;

/// How long a replica that failed a request comes after the others that serve.
const PENALTY: Duration = Duration::from_secs(5);

/// What a replica says of its health: a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not checked, or it knows nothing of health: assumed to serve.
    Unknown,
    Serving,
    NotServing,
    /// Its health could not be had.
    Unreachable,
}

impl State {
    pub const ALL: [Self; 4] = [Self::Unknown, Self::Serving, Self::NotServing, Self::Unreachable];

    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Serving => "serving",
            Self::NotServing => "not_serving",
            Self::Unreachable => "unreachable",
        }
    }
}

#[derive(Debug)]
pub struct Replica {
    pub address: SocketAddr,
    /// `host:port` as configured: what streams are opened under.
    pub authority: Authority,
    /// For TLS.
    pub name: ServerName<'static>,
    state: AtomicU8,
    /// When its penalty is over, in milliseconds since `born`; 0: it has none.
    penalty: AtomicU64,
    born: Instant,
    /// Requests that it has decided.
    decisions: AtomicU64,
    /// It let a request wait for the whole of its time and decided no other meanwhile. No request waits for it.
    stalled: AtomicBool,
    /// A request is put to it in the background.
    probed: AtomicBool,
    /// Its health is to be checked now.
    pub(super) look: Notify,
}

impl Replica {
    fn new(address: SocketAddr, authority: Authority, name: ServerName<'static>) -> Self {
        Self {
            address,
            authority,
            name,
            state: AtomicU8::new(State::Unknown as u8),
            penalty: AtomicU64::new(0),
            born: Instant::now(),
            decisions: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
            probed: AtomicBool::new(false),
            look: Notify::new(),
        }
    }

    pub fn state(&self) -> State {
        State::ALL[usize::from(self.state.load(Relaxed))]
    }

    /// Returns what it was before.
    pub fn set_state(&self, state: State) -> State {
        State::ALL[usize::from(self.state.swap(state as u8, Relaxed))]
    }

    /// A request had to go to another replica.
    pub fn failed(&self, now: Instant) {
        let until = now.saturating_duration_since(self.born) + PENALTY;
        self.penalty.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// It has decided so many requests. That it answers pings and questions about its health says nothing: one that is
    /// deadlocked does.
    pub fn decisions(&self) -> u64 {
        self.decisions.load(Relaxed)
    }

    /// A request waited in vain, and since it was sent there has been no decision. True if that is news.
    pub fn stall(&self) -> bool {
        !self.stalled.swap(true, Relaxed)
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Relaxed)
    }

    /// One request at a time is put to a replica that has stalled, to learn whether it decides again: true if that is this one.
    /// Until [`Self::probe_ended`].
    pub fn begin_probe(&self) -> bool {
        self.is_stalled() && !self.probed.swap(true, Relaxed)
    }

    pub fn probe_ended(&self) {
        self.probed.store(false, Relaxed);
    }

    /// It decided a request.
    pub fn answered(&self) {
        self.decisions.fetch_add(1, Relaxed);
        if self.stalled.load(Relaxed) && self.stalled.swap(false, Relaxed) {
            tracing::info!(address = %self.address, authority = %self.authority, "EPP replica decides again");
        }
        if self.penalty.load(Relaxed) != 0 {
            self.penalty.store(0, Relaxed);
        }
    }

    /// The lower, the sooner it is asked. One that says it does not serve may serve all the same, while it drains; one that
    /// cannot be reached costs the time to find out.
    fn rank(&self, now: Instant) -> u8 {
        let since = now.saturating_duration_since(self.born).as_millis();
        if self.is_stalled() {
            return 4;
        }
        let penalised = since < u128::from(self.penalty.load(Relaxed));
        match (self.state(), penalised) {
            (State::Serving | State::Unknown, false) => 0,
            (State::Serving | State::Unknown, true) => 1,
            (State::NotServing, false) => 2,
            (State::NotServing, true) | (State::Unreachable, _) => 3,
        }
    }
}

/// The replicas at one moment, in their order.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub replicas: Arc<[Arc<Replica>]>,
    /// Why there are none, once that is known.
    unresolved: Option<Arc<str>>,
}

impl Snapshot {
    /// The one to ask next, of those that `asked` does not have.
    pub fn best(&self, asked: &[SocketAddr], now: Instant) -> Option<&Arc<Replica>> {
        let left = self.replicas.iter().filter(|replica| !asked.contains(&replica.address));
        // Of equals the first.
        left.min_by_key(|replica| replica.rank(now))
    }
}

/// `host:port` of the configuration.
#[derive(Debug)]
pub struct Entry {
    pub host: String,
    port: u16,
    authority: Authority,
    name: ServerName<'static>,
}

pub struct Replicas {
    pub settings: config::Epp,
    pub tls: Option<Tls>,
    entries: Vec<Entry>,
    /// What each entry was found to be.
    found: Mutex<Vec<Vec<IpAddr>>>,
    current: watch::Sender<Snapshot>,
    /// The names are to be looked up now.
    pub(super) look: Notify,
}

impl Replicas {
    /// Fails on an address that is none and on TLS files that are of no use, which it reads. Entries that are addresses are
    /// known at once, names when they have been looked up.
    pub fn new(settings: &config::Epp) -> anyhow::Result<Self> {
        let entry = |address: &String| entry(address, settings.server_name.as_deref());
        let entries = settings.addresses.iter().map(entry).collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(!entries.is_empty(), "the EPP has no address");
        let found = entries.iter().map(|entry| entry.host.parse().into_iter().collect()).collect();
        let replicas = Self {
            settings: settings.clone(),
            tls: Tls::new(settings)?,
            entries,
            found: Mutex::new(found),
            current: watch::Sender::default(),
            look: Notify::new(),
        };
        replicas.merge();
        Ok(replicas)
    }

    /// Those that have to be looked up, with their places among the entries.
    pub fn names(&self) -> impl Iterator<Item = (usize, &str)> {
        let names = self.entries.iter().enumerate().map(|(place, entry)| (place, entry.host.as_str()));
        names.filter(|(_, host)| host.parse::<IpAddr>().is_err())
    }

    /// A name has these addresses now. The replicas that stay keep their state.
    pub fn resolved(&self, place: usize, mut addresses: Vec<IpAddr>) {
        addresses.sort_unstable();
        self.found.lock()[place] = addresses;
        self.merge();
    }

    /// A name could not be looked up. What it was found to be before holds.
    pub fn unresolved(&self, why: &str) {
        self.current.send_modify(|snapshot| {
            if snapshot.replicas.is_empty() {
                snapshot.unresolved = Some(why.into());
            }
        });
    }

    fn merge(&self) {
        let found = self.found.lock();
        let before = Arc::clone(&self.current.borrow().replicas);
        let mut replicas: Vec<Arc<Replica>> = Vec::new();
        for (entry, addresses) in self.entries.iter().zip(&*found) {
            for &address in addresses {
                let address = SocketAddr::new(address, entry.port);
                if replicas.iter().any(|replica| replica.address == address) {
                    continue;
                }
                let known = before.iter().find(|r| r.address == address && r.authority == entry.authority).cloned();
                let new = || Arc::new(Replica::new(address, entry.authority.clone(), entry.name.clone()));
                replicas.push(known.unwrap_or_else(new));
            }
        }
        // Without one, whoever waits goes on waiting for the first answer.
        self.current.send_replace(Snapshot { replicas: replicas.into(), unresolved: None });
    }

    pub fn snapshot(&self) -> Snapshot {
        self.current.borrow().clone()
    }

    /// For whoever wants to know of every change.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.current.subscribe()
    }

    /// The replicas, as soon as one is known, or why none is. Cancel-safe.
    pub async fn known(&self) -> Result<Snapshot, PickError> {
        let mut changes = self.changes();
        let known = changes.wait_for(|snapshot| !snapshot.replicas.is_empty() || snapshot.unresolved.is_some());
        let snapshot = match tokio::time::timeout(self.settings.connect_timeout, known).await {
            // The sender is in self.
            Ok(Ok(snapshot)) => snapshot.clone(),
            Ok(Err(_)) | Err(_) => Snapshot { unresolved: Some("no answer yet".into()), ..Snapshot::default() },
        };
        match &snapshot.unresolved {
            Some(why) => Err(PickError::Unresolved(Arc::clone(why))),
            None => Ok(snapshot),
        }
    }

    /// A request had to go to another replica: it may be that this one leads no more, or is somewhere else.
    pub fn look_again(&self) {
        self.look.notify_one();
        for replica in &*self.current.borrow().replicas {
            replica.look.notify_one();
        }
    }
}

fn entry(address: &str, server_name: Option<&str>) -> anyhow::Result<Entry> {
    let authority: Authority = address.parse().with_context(|| format!("the EPP's address {address:?}"))?;
    let port = authority.port_u16().with_context(|| format!("the EPP's address {address} has no port"))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(server_name.unwrap_or(&host).to_owned())
        .with_context(|| format!("the name of the EPP at {address}"))?;
    Ok(Entry { host, port, authority, name })
}

#[cfg(test)]
mod tests;
