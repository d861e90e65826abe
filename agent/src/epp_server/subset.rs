//! Reads the subset hint and the serving endpoint from a proxy's metadata.
//!
//! Accepts every form that proxies use: a list of strings or one string with commas, of `ip:port` or just `ip`.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use penstock_proto::core::Metadata;
use prost_types::value::Kind;

use crate::endpoint::set::Snapshot;

/// The endpoints of `all` that the subset hint names. Returns `None` without a hint, and an empty list if no endpoint matches.
pub(super) fn subset(metadata: &Metadata, all: &Snapshot) -> Option<Vec<SocketAddr>> {
    let names = strings(metadata, "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")?;
    let addresses: HashSet<SocketAddr> = names.iter().filter_map(|name| name.parse().ok()).collect();
    let host = |name: &&str| name.trim_start_matches('[').trim_end_matches(']').parse().ok();
    let hosts: HashSet<IpAddr> = names.iter().filter_map(host).collect();
    let named = |endpoint: &SocketAddr| addresses.contains(endpoint) || hosts.contains(&endpoint.ip());
    Some(all.endpoints().iter().map(|endpoint| endpoint.address).filter(named).collect())
}

/// The endpoint that served the response. If several are named, the last one.
pub(super) fn served(metadata: &Metadata) -> Option<SocketAddr> {
    strings(metadata, "envoy.lb", "x-gateway-destination-endpoint-served")?.last()?.parse().ok()
}

fn strings<'a>(metadata: &'a Metadata, namespace: &str, key: &str) -> Option<Vec<&'a str>> {
    let values = match metadata.filter_metadata.get(namespace)?.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => vec![text.as_str()],
        Kind::ListValue(list) => list
            .values
            .iter()
            .filter_map(|value| match &value.kind {
                Some(Kind::StringValue(text)) => Some(text.as_str()),
                _ => None,
            })
            .collect(),
        _ => return None,
    };
    Some(values.into_iter().flat_map(|text| text.split(',')).map(str::trim).filter(|text| !text.is_empty()).collect())
}
