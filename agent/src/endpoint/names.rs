//! Resolves a pool's endpoints from a DNS name: every address at each of the pool's ports. Looks the name up again when the
//! answer expires.

use std::{net::SocketAddr, time::Duration};

use super::feed::Feed;
use crate::{
    config::{Endpoint, NamedEndpoints, is_own},
    dns::{Answer, Dns, DnsError},
};

/// Follows the name until the future is dropped.
pub(super) async fn follow(named: NamedEndpoints, dns: Dns, mut feed: Feed) {
    loop {
        let answer = dns.resolve(&named.name).await;
        tokio::time::sleep(take(&named, answer, dns.retry_after(), &mut feed)).await;
    }
}

/// Feeds an answer into the set. Returns the time until the next lookup.
fn take(named: &NamedEndpoints, answer: Result<Answer, DnsError>, retry_after: Duration, feed: &mut Feed) -> Duration {
    match answer {
        Ok(answer) => {
            let at_each_port = |&ip| named.ports.iter().map(move |&port| SocketAddr::new(ip, port));
            let all = answer.addresses.iter().flat_map(at_each_port);
            feed.update(all.filter(|&address| !is_own(address, feed.listen)).map(Endpoint::from).collect());
            answer.holds
        }
        Err(error) => {
            feed.failed(error.reason(), &error, !feed.failing);
            retry_after
        }
    }
}
