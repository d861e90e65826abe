//! Asks an EPP: one `EppClient` per worker and EPP, with connections to each replica in use, and one `PickStream` per request.
//!
//! A stream takes the request's head and body and returns the EPP's outcome; later it sends the response's head and end.

mod stream;

use std::{net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::task::{AbortOnDropHandle, TaskTracker, task_tracker::TaskTrackerToken};

pub use self::stream::{Heard, PickStream, ResponseReply, StreamEnding};
use super::{
    attempts::Attempts,
    connection::ReplicaConnections,
    error::PickError,
    exchange::{Exchange, ExchangeLimits},
    keep::{self, Start},
    replica::{Replica, Replicas},
    silence::Silence,
};
use crate::endpoint::set::EndpointSet;

/// The method that an EPP serves.
const PROCESS: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// How much longer an EPP's message may be than the body in it.
const MESSAGE: usize = 1 << 20;

/// A worker's client of one EPP.
pub struct EppClient {
    replicas: Arc<Replicas>,
    links: Arc<Links>,
    endings: TaskTracker,
    keeper: Option<AbortOnDropHandle<()>>,
    _user: TaskTrackerToken,
}

/// A worker's connections to the replicas of an EPP.
pub(super) struct Links {
    pub(super) replicas: Arc<Replicas>,
    known: Mutex<KnownReplicas>,
}

/// Connections to the replicas that have been asked and still exist.
#[derive(Default)]
struct KnownReplicas {
    links: Vec<ReplicaLink>,
    /// The replicas when `links` was last updated.
    replicas: Arc<[Arc<Replica>]>,
}

/// A worker's connections to one replica. Clones share it.
#[derive(Clone)]
struct ReplicaLink {
    replica: Arc<Replica>,
    connection: ReplicaConnections,
    silence: Arc<Silence>,
}

impl EppClient {
    /// Creates the client. It connects with the first request.
    pub fn new(replicas: Arc<Replicas>) -> Self {
        let links = Arc::new(Links { replicas: Arc::clone(&replicas), known: Mutex::default() });
        let user = replicas.users.token();
        Self { replicas, links, endings: TaskTracker::new(), keeper: None, _user: user }
    }

    /// Creates the client, which connects now and whenever its connection is lost. The agent's start waits for the first connection
    /// if `start` is set. Must be called on a tokio runtime.
    pub fn connected(replicas: Arc<Replicas>, start: Option<Start>) -> Self {
        let client = Self::new(replicas);
        let (connected, is_connected) = oneshot::channel();
        if let Some(start) = start {
            tokio::spawn(start.open(is_connected));
        }
        let keeper = AbortOnDropHandle::new(tokio::spawn(keep::keep(Arc::clone(&client.links), connected)));
        Self { keeper: Some(keeper), ..client }
    }

    /// Connects no more without a request. Called when a reload has replaced the EPP.
    pub fn retire(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
    }

    /// Resolves when all streams that were [finished](PickStream::finish) have sent their rest or timed out. Call it when nothing
    /// more is asked.
    pub async fn finished(&self) {
        self.endings.close();
        self.endings.wait().await;
    }

    /// Whether this client asks these replicas.
    pub fn asks(&self, replicas: &Arc<Replicas>) -> bool {
        Arc::ptr_eq(&self.replicas, replicas)
    }

    /// The EPP's replicas.
    pub fn replicas(&self) -> &Arc<Replicas> {
        &self.replicas
    }

    /// Selects the replica to ask about a request. See [`Attempts::begin`].
    pub async fn attempts(&self) -> Result<Attempts, PickError> {
        Attempts::begin(&self.replicas).await
    }

    /// The replicas that have stalled.
    pub fn stalled(&self) -> Vec<Arc<Replica>> {
        self.replicas.snapshot().replicas.iter().filter(|replica| replica.is_stalled()).cloned().collect()
    }

    /// Opens a stream about a request without waiting. `subset` is the subset hint. Must be called on a tokio runtime.
    pub fn open(
        &self,
        replica: &Arc<Replica>,
        request: &http::request::Parts,
        has_body: bool,
        subset: Option<&[SocketAddr]>,
        limits: ExchangeLimits,
        members: Option<Arc<EndpointSet>>,
    ) -> PickStream {
        let link = self.links.link(replica);
        let header = self.replicas.settings.header.clone();
        let message_limit = limits.replaced_body + MESSAGE;
        let mut exchange = Exchange::new(header, request, has_body, subset, limits);
        if let Some(members) = members {
            exchange = exchange.with_members(members);
        }
        let method = link.connection.method(PROCESS);
        let mut stream = PickStream::new(exchange, &link, method, message_limit, self.endings.clone());
        if let Some(open) = link.connection.try_stream() {
            stream.begin(open);
        }
        if !has_body {
            stream.send_now();
        }
        stream
    }
}

impl Links {
    pub(super) fn connection(&self, replica: &Arc<Replica>) -> ReplicaConnections {
        self.link(replica).connection
    }

    fn link(&self, replica: &Arc<Replica>) -> ReplicaLink {
        let replicas = self.replicas.snapshot().replicas;
        let mut known = self.known.lock();
        if !Arc::ptr_eq(&known.replicas, &replicas) {
            // Connections to removed replicas close when their streams end.
            known.links.retain(|link| replicas.iter().any(|replica| Arc::ptr_eq(replica, &link.replica)));
            known.replicas = replicas;
        }
        if let Some(link) = known.links.iter().find(|link| Arc::ptr_eq(&link.replica, replica)) {
            return link.clone();
        }
        let connection = ReplicaConnections::new(&self.replicas, replica);
        let link = ReplicaLink { replica: Arc::clone(replica), connection, silence: Arc::default() };
        known.links.push(link.clone());
        link
    }
}

#[cfg(test)]
mod tests;
