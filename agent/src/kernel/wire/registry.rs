//! The flows that have begun, of this agent and adopted ones: what the admin port lists and ends.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use penstock_common::wire::flow::{CLIENT, ENDPOINT, state};
use tokio::sync::watch;

use super::{Seen, adopted::peer, seen::state_of, table::Table};
use crate::kernel::socket::monotonic_ns;

/// Why a flow is ended from outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowStop {
    /// The admin port was asked to.
    Deleted,
    /// Its packets have no way to a peer any more.
    Unrouted,
}

impl FlowStop {
    /// Label for metrics and logs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Deleted => "deleted",
            Self::Unrouted => "unrouted",
        }
    }
}

/// A flow that the kernel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListedFlow {
    /// The client's address.
    pub client: SocketAddr,
    /// The endpoint's address.
    pub endpoint: SocketAddr,
    /// Payload bytes to the client.
    pub bytes: u64,
    /// Time since the last payload.
    pub quiet: Duration,
    /// Another agent has begun it.
    pub is_adopted: bool,
}

/// Indices of the interfaces to which a flow's programs are attached.
pub(super) type AttachedTo = Arc<Mutex<Vec<u32>>>;

/// A flow that the programs carry, and its table.
pub(super) struct ActiveFlow {
    pub(super) id: u64,
    pub(super) table: Arc<Table>,
    pub(super) index: u32,
    pub(super) interfaces: AttachedTo,
}

/// The flows of one agent.
#[derive(Default)]
pub struct Registry {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    by_id: HashMap<u64, Entry>,
}

struct Entry {
    table: Arc<Table>,
    index: u32,
    is_adopted: bool,
    interfaces: AttachedTo,
    stop: watch::Sender<Option<FlowStop>>,
}

/// A flow's place in the registry, which its owner holds.
pub(super) struct Registered {
    registry: Arc<Registry>,
    id: u64,
    stop: watch::Receiver<Option<FlowStop>>,
}

impl Registry {
    /// Enters a flow. It is listed once it has begun.
    pub(super) fn enter(
        self: &Arc<Self>,
        table: &Arc<Table>,
        index: u32,
        interfaces: &AttachedTo,
        is_adopted: bool,
    ) -> Registered {
        let (sender, stop) = watch::channel(None);
        let mut entries = self.entries.lock();
        let id = entries.next;
        entries.next += 1;
        let (table, interfaces) = (Arc::clone(table), Arc::clone(interfaces));
        entries.by_id.insert(id, Entry { table, index, is_adopted, interfaces, stop: sender });
        Registered { registry: Arc::clone(self), id, stop }
    }

    /// The flows that have begun and not ended, by the address of the client.
    pub fn list(&self) -> Vec<ListedFlow> {
        let now = monotonic_ns();
        let mut list: Vec<_> = self.entries.lock().by_id.values().filter_map(|entry| entry.listed(now)).collect();
        list.sort_by_key(|flow| (flow.client, flow.endpoint));
        list
    }

    /// The flows that the programs carry.
    pub(super) fn active(&self) -> Vec<ActiveFlow> {
        let entries = self.entries.lock();
        let active =
            entries.by_id.iter().filter(|(_, entry)| state_of(entry.table.words(entry.index)) == state::ACTIVE);
        let flow = |(&id, entry): (&u64, &Entry)| {
            let (table, interfaces) = (Arc::clone(&entry.table), Arc::clone(&entry.interfaces));
            ActiveFlow { id, table, index: entry.index, interfaces }
        };
        active.map(flow).collect()
    }

    /// Asks the owner of a flow to end it.
    pub(super) fn stop(&self, id: u64, why: FlowStop) {
        if let Some(entry) = self.entries.lock().by_id.get(&id) {
            entry.stop.send_replace(Some(why));
        }
    }

    /// Asks the owners of flows that have begun to end them: those of this client's connection, or all. Returns their number.
    pub fn end(&self, client: Option<SocketAddr>, why: FlowStop) -> usize {
        let entries = self.entries.lock();
        let now = monotonic_ns();
        let mut asked = 0;
        for entry in entries.by_id.values() {
            if entry.listed(now).is_some_and(|flow| client.is_none_or(|client| client == flow.client)) {
                entry.stop.send_replace(Some(why));
                asked += 1;
            }
        }
        asked
    }
}

impl Entry {
    fn listed(&self, now_ns: u64) -> Option<ListedFlow> {
        let (seen, ends) = (Seen::of(self.table.words(self.index)), self.table.ends(self.index));
        (seen.state == state::ACTIVE && !seen.has_ended()).then(|| ListedFlow {
            client: peer(&ends[CLIENT]),
            endpoint: peer(&ends[ENDPOINT]),
            bytes: seen.bytes,
            quiet: Duration::from_nanos(now_ns.saturating_sub(seen.last_ns)),
            is_adopted: self.is_adopted,
        })
    }
}

impl Registered {
    /// Why the flow is to be ended, if it is.
    pub(super) fn stop(&self) -> Option<FlowStop> {
        *self.stop.borrow()
    }

    /// Resolves when the flow is to be ended. Cancel-safe.
    pub(super) async fn stopped(&self) -> FlowStop {
        let mut stop = self.stop.clone();
        match stop.wait_for(Option::is_some).await.map(|why| *why) {
            Ok(Some(why)) => why,
            // The entry holds the sender for as long as `self` lives.
            _ => std::future::pending().await,
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.entries.lock().by_id.remove(&self.id);
    }
}
