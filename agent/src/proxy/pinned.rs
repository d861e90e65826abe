//! A connection that stays with the endpoint that was picked for its first request (`pick_per = "connection"`): after the
//! first response, whatever follows goes both ways as it is.
//!
//! It ends when both sides have ended theirs, at an error, after the idle time; and at the first quiet second after its age
//! is over, the endpoint drains, or the agent does: then with a reset, when the client has all that was sent, because nobody has
//! read whether a message was over.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use bytes::BytesMut;
use tokio::time::Instant;

use super::{After, record::count, respond::lanes};
use crate::{
    client::ClientSocket,
    deliver::{Account, End, Tunnel},
    endpoint::connection::EndpointConnection,
    worker::Current,
};

/// How often a pinned connection looks whether its endpoint drains.
const LOOK: Duration = Duration::from_secs(1);

/// What a connection is pinned to.
pub struct Pin {
    pub(super) endpoint: EndpointConnection,
    pub(super) pool: usize,
    pub(super) target: Option<u64>,
    /// As the route of the first request has it.
    pub(super) idle: Option<Duration>,
}

/// Carries what follows, to the end.
pub async fn pinned(current: &Rc<Current>, client: &mut ClientSocket, pin: Pin, peer: SocketAddr) -> After {
    let worker = &current.worker();
    let Pin { mut endpoint, pool, target, idle } = pin;
    let (address, began) = (endpoint.address, Instant::now());
    let config = &worker.shared.config.pools[pool];
    let metrics = worker.shared.metrics.pool(pool);
    let open = metrics.pinned_connection();
    // Only the ends of both directions are an end in order.
    client.reset_on_close();
    endpoint.reset_on_close();
    let (down, up, path) = lanes(worker, client, target, &endpoint);
    let (lead, pending, account) = (BytesMut::new(), BytesMut::new(), Account::default());
    let mut tunnel = Tunnel { client, endpoint: &mut endpoint, lead, pending, idle, down, up, account };
    let over = async {
        tokio::select! {
            () = worker.shared.draining.cancelled() => {}
            () = aged(config.pin.age) => {}
            () = drains(current, address) => {}
        }
    };
    let end = tunnel.run(over).await;
    let account = tunnel.account;
    drop(open);
    metrics.pin_ended(end.reason(), began.elapsed());
    count(&worker.shared.metrics, &account);
    tracing::info!(
        target: "penstock::access",
        pinned = true,
        client = %peer,
        pool = config.name,
        endpoint = %address,
        reason = end.reason(),
        carried_by = path.label(),
        bytes_kernel = account.steered + account.local,
        bytes_user = account.relayed,
        bytes_up = account.upstream,
        bytes_up_kernel = account.upstream_steered,
        took_us = began.elapsed().as_micros() as u64,
    );
    match end {
        End::Complete { .. } => {
            endpoint.set_resting(true);
            After::Close
        }
        End::Over => {
            endpoint.set_resting(true);
            After::Abort
        }
        End::ClientGone | End::Broken | End::Idle => After::Abort,
    }
}

async fn aged(age: Option<Duration>) {
    match age {
        Some(age) => tokio::time::sleep(age).await,
        None => std::future::pending().await,
    }
}

/// Resolves when the endpoint gets no new requests under the configuration that holds by then.
async fn drains(current: &Rc<Current>, address: SocketAddr) {
    while current.worker().shared.is_dialled(address) {
        tokio::time::sleep(LOOK).await;
    }
}
