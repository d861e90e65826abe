//! A pinned connection stays with the endpoint that was picked for its first request (`pick_per = "connection"`). After the first
//! response, bytes are relayed in both directions without being parsed. The pin ends when both sides have closed, at an error or
//! after the idle timeout. When `pin.age` has passed, or the endpoint or the agent drains, it ends after the next quiet second
//! with a reset, once the client has received everything: the agent does not know where a message ends.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use bytes::BytesMut;
use tokio::time::Instant;

use super::{
    access_log,
    record::count,
    request::{AfterRequest, Pin},
    respond::open_tunnel,
};
use crate::{
    client::ClientSocket,
    deadline,
    deliver::{End, Tunnel},
    shared::Shared,
    worker::Current,
};

/// How often a pinned connection checks whether its endpoint drains.
const DRAIN_CHECK: Duration = Duration::from_secs(1);

/// Relays the connection until the pin ends.
pub async fn pinned(current: &Rc<Current>, client: &mut ClientSocket, pin: Pin, peer: SocketAddr) -> AfterRequest {
    let Pin { mut endpoint, pool, metrics, age, target, idle } = pin;
    let (address, began) = (endpoint.address, Instant::now());
    let open = metrics.pinned_connection();
    // Only an orderly close in both directions is passed on as one. The response before this was complete; what follows need not be.
    client.reset_on_close();
    endpoint.reset_on_close();
    endpoint.set_resting(false);
    let (down, up) = open_tunnel(&current.worker(), client, target, &endpoint);
    let (path, lead, pending) = (down.path, BytesMut::new(), BytesMut::new());
    let mut tunnel = Tunnel { client, endpoint: &mut endpoint, lead, pending, idle, down, up };
    let (draining, force) = {
        let worker = current.worker();
        (worker.shared.draining.clone(), worker.shared.force.clone())
    };
    let over = async {
        tokio::select! {
            () = draining.cancelled() => {}
            () = deadline::elapsed(age) => {}
            () = drains(current, &pool, address) => {}
        }
    };
    let end = tunnel.run(over, force.cancelled()).await;
    let account = tunnel.down.account;
    drop(open);
    metrics.pin_ended(end.reason(), began.elapsed());
    count(&current.worker().shared.metrics, &account);
    access_log::pinned(peer, &pool, address, path, end.reason(), &account, began.elapsed());
    match end {
        End::Complete { .. } => {
            endpoint.set_resting(true);
            AfterRequest::Close
        }
        End::Over => {
            endpoint.set_resting(true);
            AfterRequest::Abort
        }
        End::ClientGone | End::Broken | End::Idle | End::Left | End::Stopped(_) => AfterRequest::Abort,
    }
}

/// Resolves when the pool's requests may not go to the endpoint any more under the current configuration.
async fn drains(current: &Rc<Current>, pool: &str, address: SocketAddr) {
    let admits = |shared: &Shared| shared.pool_named(pool).is_some_and(|pool| shared.admits(pool, address));
    while admits(&current.worker().shared) {
        tokio::time::sleep(DRAIN_CHECK).await;
    }
}
