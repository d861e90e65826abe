//! The replicas of one pool's EPP and their state, shared by all workers. `tend` resolves names and checks health.
//!
//! Replicas are ordered as configured and then by address, the same for every agent. Requests go to the first replica with the best
//! rank: the leader, if there is leader election; otherwise one EPP keeps all the state (prefixes, load). Health decides only the
//! order: an EPP without a serving replica is still asked.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::uri::Authority;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

use super::{
    address::{ReplicaAddress, ReplicaEntry, UNIX},
    error::PickError,
    waiting_room::WaitingRoom,
};
use crate::{
    config,
    endpoint::local_fault::is_exhaustion,
    metrics::EppConnections,
    server_tls::{self, Connectors},
};

/// How long a replica that failed a request ranks below other serving ones.
const PENALTY: Duration = Duration::from_secs(5);

/// A replica's health. A metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReplicaState {
    /// Not checked, or the server does not report health. Assumed to serve.
    Unknown,
    Serving,
    NotServing,
    /// The health check got no reply.
    Unreachable,
}

impl ReplicaState {
    /// All states, indexed by their discriminants.
    pub const ALL: [Self; 4] = [Self::Unknown, Self::Serving, Self::NotServing, Self::Unreachable];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Serving => "serving",
            Self::NotServing => "not_serving",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One replica of an EPP.
#[derive(Debug)]
pub struct Replica {
    pub address: ReplicaAddress,
    /// `host:port` as configured; the authority of streams.
    pub authority: Authority,
    /// The server name for TLS.
    pub name: ServerName<'static>,
    state: AtomicU8,
    /// When the penalty ends, in milliseconds since `born`. 0 means no penalty.
    penalty: AtomicU64,
    born: Instant,
    /// The number of requests that the replica has decided.
    decisions: AtomicU64,
    /// Whether a request timed out while the replica decided no other. No request waits for a stalled replica.
    stalled: AtomicBool,
    /// Whether a probe is in progress.
    probed: AtomicBool,
    /// Whether the last attempt to connect failed.
    is_unreachable: AtomicBool,
    why_unreachable: Mutex<Option<Arc<io::Error>>>,
    /// Told when the replica's health or reachability changes.
    news: News,
    /// Notified to check the replica's health now.
    pub(super) look: Notify,
}

/// Tells that the replicas, their health or their reachability changed.
pub type News = Arc<watch::Sender<()>>;

impl Replica {
    fn new(address: ReplicaAddress, authority: Authority, name: ServerName<'static>, news: News) -> Self {
        Self {
            address,
            authority,
            name,
            state: AtomicU8::new(ReplicaState::Unknown as u8),
            penalty: AtomicU64::new(0),
            born: Instant::now(),
            decisions: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
            probed: AtomicBool::new(false),
            is_unreachable: AtomicBool::new(false),
            why_unreachable: Mutex::default(),
            news,
            look: Notify::new(),
        }
    }

    /// The state after the last health check.
    pub fn state(&self) -> ReplicaState {
        ReplicaState::ALL[usize::from(self.state.load(Relaxed))]
    }

    /// Sets the state. Returns the previous one.
    pub fn set_state(&self, state: ReplicaState) -> ReplicaState {
        let before = ReplicaState::ALL[usize::from(self.state.swap(state as u8, Relaxed))];
        if before != state {
            self.news.send_replace(());
        }
        before
    }

    /// Connecting failed. Until [`Self::reached`], no request connects. An exhausted machine says nothing about the replica.
    pub fn unreachable(&self, why: &Arc<io::Error>) {
        if is_exhaustion(why) {
            return;
        }
        let mut kept = self.why_unreachable.lock();
        *kept = Some(Arc::clone(why));
        if !self.is_unreachable.swap(true, Relaxed) {
            self.news.send_replace(());
        }
    }

    /// Connecting succeeded.
    pub fn reached(&self) {
        if !self.is_unreachable() {
            return;
        }
        let mut kept = self.why_unreachable.lock();
        *kept = None;
        self.renewed();
        if self.is_unreachable.swap(false, Relaxed) {
            self.news.send_replace(());
        }
    }

    /// The replica is connected again after its connection was lost or refused. Its process may be another one, so a stall of the
    /// previous one tells nothing. A probe in progress continues.
    pub fn renewed(&self) {
        if self.stalled.swap(false, Relaxed) {
            tracing::info!(
                address = %self.address,
                authority = %self.authority,
                "EPP replica connected again, no longer taken for stalled"
            );
        }
    }

    pub fn is_unreachable(&self) -> bool {
        self.is_unreachable.load(Relaxed)
    }

    /// Why the replica cannot be connected; `None` if the last attempt succeeded or there was none.
    pub fn why_unreachable(&self) -> Option<Arc<io::Error>> {
        if self.is_unreachable() { self.why_unreachable.lock().clone() } else { None }
    }

    /// The replica failed a request, which goes to another replica.
    pub fn failed(&self, now: Instant) {
        let until = now.saturating_duration_since(self.born) + PENALTY;
        self.penalty.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The number of requests that the replica has decided. Replies to pings and health checks prove nothing: a deadlocked EPP
    /// sends them, too.
    pub fn decisions(&self) -> u64 {
        self.decisions.load(Relaxed)
    }

    /// Marks the replica as stalled: a request timed out and there was no decision since it was sent. Returns true if it was not
    /// stalled before.
    pub fn stall(&self) -> bool {
        !self.stalled.swap(true, Relaxed)
    }

    /// Whether the replica is stalled.
    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Relaxed)
    }

    /// Begins a probe of a stalled replica, one at a time. Returns false if the replica is not stalled or is being probed. The
    /// probe lasts until [`Self::probe_ended`].
    pub fn begin_probe(&self) -> bool {
        self.is_stalled() && !self.probed.swap(true, Relaxed)
    }

    /// Ends a probe.
    pub fn probe_ended(&self) {
        self.probed.store(false, Relaxed);
    }

    /// The replica decided a request.
    pub fn answered(&self) {
        self.decisions.fetch_add(1, Relaxed);
        if self.stalled.load(Relaxed) && self.stalled.swap(false, Relaxed) {
            tracing::info!(address = %self.address, authority = %self.authority, "EPP replica recovered from its stall");
        }
        if self.penalty.load(Relaxed) != 0 {
            self.penalty.store(0, Relaxed);
        }
    }

    /// A lower rank is asked first. A replica that reports not serving may still serve while it drains; an unreachable one costs
    /// the connect timeout.
    fn rank(&self, now: Instant) -> u8 {
        let since = now.saturating_duration_since(self.born).as_millis();
        if self.is_stalled() {
            return 4;
        }
        if self.is_unreachable() {
            return 3;
        }
        let penalised = since < u128::from(self.penalty.load(Relaxed));
        match (self.state(), penalised) {
            (ReplicaState::Serving | ReplicaState::Unknown, false) => 0,
            (ReplicaState::Serving | ReplicaState::Unknown, true) => 1,
            (ReplicaState::NotServing, false) => 2,
            (ReplicaState::NotServing, true) | (ReplicaState::Unreachable, _) => 3,
        }
    }
}

/// The replicas at one moment, in order.
#[derive(Debug, Clone, Default)]
pub struct ReplicaSnapshot {
    pub replicas: Arc<[Arc<Replica>]>,
    /// Why there are no replicas, once that is known.
    unresolved: Option<Arc<str>>,
}

impl ReplicaSnapshot {
    /// The replica to ask next, without those in `asked`.
    pub fn best(&self, asked: &[ReplicaAddress], now: Instant) -> Option<&Arc<Replica>> {
        let left = self.replicas.iter().filter(|replica| !asked.contains(&replica.address));
        // `min_by_key` returns the first of equal ranks.
        left.min_by_key(|replica| replica.rank(now))
    }
}

/// The replicas of one pool's EPP.
pub struct Replicas {
    pub settings: config::Epp,
    /// Its own copy, because requests outlive the replicas.
    pub metadata: Arc<config::EppMetadata>,
    pub tls: Option<Connectors>,
    entries: Vec<ReplicaEntry>,
    /// The addresses of each entry.
    found: Mutex<Vec<Vec<ReplicaAddress>>>,
    current: watch::Sender<ReplicaSnapshot>,
    news: News,
    /// How many tasks connect again to unreachable replicas.
    tended: AtomicUsize,
    /// Counts connections that carry requests.
    pub(super) connections: EppConnections,
    /// The clients of workers, some of which may belong to requests that began before a reload.
    pub(super) users: TaskTracker,
    /// Requests that wait for a replica.
    pub waiting_room: Arc<WaitingRoom>,
    /// Notified to resolve the names now.
    pub(super) look: Notify,
}

impl Replicas {
    /// Reads the TLS files. Fails on an invalid address or TLS file. Entries that are IP addresses are known at once, names after
    /// they were resolved.
    pub fn new(settings: &config::Epp) -> anyhow::Result<Self> {
        let entry = |address: &String| ReplicaEntry::new(address, settings.server_name.as_deref());
        let entries = settings.addresses.iter().map(entry).collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(!entries.is_empty(), "the EPP has no address");
        let found = entries.iter().map(|entry| entry.known().into_iter().collect()).collect();
        let replicas = Self {
            settings: settings.clone(),
            metadata: Arc::new(settings.metadata.clone()),
            tls: Connectors::new(&settings.tls, settings.client_certificate.as_ref(), server_tls::H2)?,
            entries,
            found: Mutex::new(found),
            current: watch::Sender::default(),
            news: News::default(),
            tended: AtomicUsize::new(0),
            connections: EppConnections::default(),
            users: TaskTracker::new(),
            waiting_room: WaitingRoom::new(settings.unreachable_wait_requests, settings.unreachable_wait_bytes),
            look: Notify::new(),
        };
        replicas.merge();
        Ok(replicas)
    }

    /// Counts connections to these replicas here.
    #[must_use]
    pub fn counted(self, connections: EppConnections) -> Self {
        Self { connections, ..self }
    }

    /// Begins with the addresses that `before` has found, if these are replicas of the same names.
    #[must_use]
    pub fn found_by(self, before: &Self) -> Self {
        if (&self.settings.addresses, self.settings.is_service)
            == (&before.settings.addresses, before.settings.is_service)
        {
            self.found.lock().clone_from(&before.found.lock());
            self.merge();
        }
        self
    }

    /// The names to resolve, with the indices of their entries. None if the replicas are those of a Service.
    pub fn names(&self) -> impl Iterator<Item = (usize, &str)> {
        let names = self.entries.iter().enumerate().map(|(place, entry)| (place, entry.host.as_str()));
        let is_name = |host: &str| !host.starts_with(UNIX) && host.parse::<IpAddr>().is_err();
        names.filter(move |(_, host)| !self.settings.is_service && is_name(host))
    }

    /// The port of the entry with this index.
    pub(super) fn port(&self, place: usize) -> u16 {
        self.entries[place].port
    }

    /// A name was resolved to these addresses. Replicas that stay keep their state.
    pub fn resolved(&self, place: usize, mut addresses: Vec<IpAddr>) {
        addresses.sort_unstable();
        let port = self.port(place);
        let at = |ip| SocketAddr::new(ip, port).into();
        self.found.lock()[place] = addresses.into_iter().map(at).collect();
        self.merge();
    }

    /// The Service has these ready replicas. Replicas that stay keep their state and their connections. Returns true if they
    /// changed.
    pub fn listed(&self, mut addresses: Vec<SocketAddr>) -> bool {
        addresses.sort_unstable();
        let is_empty = addresses.is_empty();
        let addresses: Vec<ReplicaAddress> = addresses.into_iter().map(Into::into).collect();
        let changed = match self.found.lock().first_mut() {
            Some(found) if *found != addresses => {
                *found = addresses;
                true
            }
            Some(_) | None => false,
        };
        if changed {
            self.merge();
        }
        if is_empty {
            self.unresolved(&format!("the EPP's Service {} has no ready endpoint", self.settings.addresses.join(", ")));
        }
        changed
    }

    /// A name could not be resolved. Its previous addresses are kept.
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
            for address in addresses {
                if replicas.iter().any(|replica| replica.address == *address) {
                    continue;
                }
                let known = before.iter().find(|r| r.address == *address && r.authority == entry.authority).cloned();
                let news = || Arc::clone(&self.news);
                let new =
                    || Arc::new(Replica::new(address.clone(), entry.authority.clone(), entry.name.clone(), news()));
                replicas.push(known.unwrap_or_else(new));
            }
        }
        // If there are no replicas, waiting requests continue to wait for the first answer.
        self.current.send_replace(ReplicaSnapshot { replicas: replicas.into(), unresolved: None });
        self.news.send_replace(());
    }

    /// The current replicas.
    pub fn snapshot(&self) -> ReplicaSnapshot {
        self.current.borrow().clone()
    }

    /// Receives every change of the replicas.
    pub fn changes(&self) -> watch::Receiver<ReplicaSnapshot> {
        self.current.subscribe()
    }

    /// Is told every change of the replicas, their health and their reachability.
    pub fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// Resolves when a replica is known that is not known to be unreachable. Cancel-safe.
    pub async fn reachable(&self) {
        let mut news = self.news();
        while self.snapshot().replicas.iter().all(|replica| replica.is_unreachable()) {
            // Cannot fail, because the sender is in `self`.
            if news.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether a task connects again to unreachable replicas, so that requests need not.
    pub fn is_tended(&self) -> bool {
        self.tended.load(Relaxed) > 0
    }

    /// Makes requests leave connecting to the caller while the guard exists.
    pub fn tended(self: &Arc<Self>) -> Tended {
        self.tended.fetch_add(1, Relaxed);
        Tended(Arc::clone(self))
    }

    /// Waits for at most `connect_timeout` until a replica is known. Fails with `Unresolved` or `NoReplica`
    /// and the reason. Cancel-safe.
    pub async fn known(&self) -> Result<ReplicaSnapshot, PickError> {
        let mut changes = self.changes();
        let known = changes.wait_for(|snapshot| !snapshot.replicas.is_empty() || snapshot.unresolved.is_some());
        let snapshot = match tokio::time::timeout(self.settings.connect_timeout, known).await {
            // The channel cannot close, because the sender is in `self`.
            Ok(Ok(snapshot)) => snapshot.clone(),
            Ok(Err(_)) | Err(_) => {
                ReplicaSnapshot { unresolved: Some("no DNS answer yet".into()), ..ReplicaSnapshot::default() }
            }
        };
        match &snapshot.unresolved {
            Some(why) if self.settings.is_service => Err(PickError::NoReplica(Arc::clone(why))),
            Some(why) => Err(PickError::Unresolved(Arc::clone(why))),
            None => Ok(snapshot),
        }
    }

    /// Resolves the names and checks all replicas now: a failed one may have lost its leadership or changed its address.
    pub fn recheck(&self) {
        self.look.notify_one();
        for replica in &*self.current.borrow().replicas {
            replica.look.notify_one();
        }
    }
}

/// See [`Replicas::tended`].
#[must_use = "holds while it exists"]
pub struct Tended(Arc<Replicas>);

impl Drop for Tended {
    fn drop(&mut self) {
        self.0.tended.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests;
