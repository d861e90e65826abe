//! Resolves a pool's endpoints from a DNS name: every address at each of the pool's ports. Looks the name up again when the
//! answer expires. Addresses at which this agent listens are skipped.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::feed::Feed;
use crate::{
    config::{ListedEndpoint, NamedEndpoints},
    dns::{DnsAnswer, DnsError, DnsResolver},
    listeners::Listeners,
};

/// Follows the name until the future is dropped.
pub(super) async fn follow(named: NamedEndpoints, dns: DnsResolver, own: Listeners, mut feed: Feed) {
    let mut skipped = Vec::new();
    loop {
        let answer = dns.resolve(&named.name).await;
        let endpoints = |addresses: &[IpAddr]| {
            let at_each_port = |&ip| named.ports.iter().map(move |&port| SocketAddr::new(ip, port));
            let all = addresses.iter().flat_map(at_each_port);
            let (ours, others): (Vec<_>, Vec<_>) = all.partition(|&address| own.accept(address));
            if ours != skipped && !ours.is_empty() {
                tracing::warn!(name = named.name, addresses = ?ours, "endpoint is one of the agent's own listeners, skipping it");
            }
            skipped = ours;
            others.into_iter().map(ListedEndpoint::from).collect()
        };
        tokio::time::sleep(take(answer, dns.retry_after(), &mut feed, endpoints)).await;
    }
}

/// Feeds an answer into the set. `endpoints` makes endpoints of its addresses. Returns the time until the next lookup.
fn take(
    answer: Result<DnsAnswer, DnsError>,
    retry_after: Duration,
    feed: &mut Feed,
    endpoints: impl FnOnce(&[IpAddr]) -> Vec<ListedEndpoint>,
) -> Duration {
    match answer {
        Ok(answer) => {
            feed.update(endpoints(&answer.addresses));
            answer.holds
        }
        Err(error) => {
            feed.failed(error.reason(), &error, !feed.failing);
            retry_after
        }
    }
}
