//! Where the endpoints of a pool come from: `endpoints`, `endpoints_dns`, `endpoints_file`, and `ports` for addresses that
//! have none of their own.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use toml::de::DeValue;

use super::{
    Endpoint, NamedEndpoints,
    document::Section,
    value::{self, Expected, Parsed},
};

/// As many ranks as an InferencePool may have target ports.
const MAX_PORTS: usize = 8;

pub(super) fn ports(section: &mut Section<'_>) -> Vec<u16> {
    let ports = section.list("ports", "an array of port numbers", value::integer(1..=u16::MAX));
    if ports.len() > MAX_PORTS {
        section.reject("ports", format_args!("{} ports", ports.len()), format_args!("at most {MAX_PORTS}"));
    }
    for (index, port) in ports.iter().enumerate().filter(|(index, port)| ports[..*index].contains(port)) {
        section.reject(&format!("ports[{index}]"), format_args!("{port} again"), "each port once");
    }
    ports
}

/// An address without a port stands for one endpoint at each of `ports`.
pub(super) fn listed(section: &mut Section<'_>, ports: &[u16], listen: SocketAddr) -> Vec<Endpoint> {
    let mut endpoints: Vec<Endpoint> = Vec::new();
    let elements = section.list("endpoints", "an array of ip:port", |value| listed_element(value, ports));
    for (index, element) in elements.into_iter().enumerate() {
        let key = format!("endpoints[{index}]");
        for endpoint in element {
            let address = endpoint.address;
            if endpoints.iter().any(|other| other.address == address) {
                section.reject(&key, format_args!("\"{address}\" again"), "each endpoint once");
            } else if is_own(address, listen) {
                let expected = format_args!("another server than listen.address ({listen})");
                section.reject(&key, format_args!("\"{address}\""), expected);
            }
            endpoints.push(endpoint);
        }
    }
    endpoints
}

pub(super) fn named(section: &mut Section<'_>, ports: &[u16]) -> Option<NamedEndpoints> {
    let name = section.read("endpoints_dns", value::host)?;
    if ports.is_empty() && !section.has("ports") {
        section.reject("endpoints_dns", format_args!("{name:?} without ports"), "ports beside it");
    }
    Some(NamedEndpoints { name, ports: ports.to_vec() })
}

pub(super) fn file(section: &mut Section<'_>) -> Option<PathBuf> {
    let file = section.read("endpoints_file", value::non_empty)?;
    Some(section.folder().join(file))
}

fn listed_element(value: &DeValue<'_>, ports: &[u16]) -> Parsed<Vec<Endpoint>> {
    const EXPECTED: &str =
        r#"{ address = "ip:port", node = "n1", zone = "a", draining = false }, all but address optional"#;
    let expected = || Expected(EXPECTED.into());
    let DeValue::Table(table) = value else { return addresses(value, ports).map(plain) };
    let known = ["address", "node", "zone", "draining"];
    if table.keys().any(|key| !known.contains(&key.get_ref().as_ref())) {
        return Err(expected());
    }
    let get = |key: &str| table.get(key).map(toml::Spanned::get_ref);
    let address = get("address").ok_or_else(expected)?;
    let node = get("node").map(value::non_empty).transpose().map_err(|_| expected())?;
    let zone = get("zone").map(value::non_empty).transpose().map_err(|_| expected())?;
    let draining = get("draining").map(value::boolean).transpose().map_err(|_| expected())?.unwrap_or(false);
    let endpoint = |address| Endpoint { address, node: node.clone(), zone: zone.clone(), draining };
    Ok(addresses(address, ports)?.into_iter().map(endpoint).collect())
}

fn plain(addresses: Vec<SocketAddr>) -> Vec<Endpoint> {
    addresses.into_iter().map(Endpoint::from).collect()
}

fn addresses(value: &DeValue<'_>, ports: &[u16]) -> Parsed<Vec<SocketAddr>> {
    let text = if let DeValue::String(text) = value { text.as_ref() } else { "" };
    match expand(text, ports) {
        Some(addresses) => Ok(addresses),
        None => value::endpoint(value).map(|address| vec![address]),
    }
}

/// The endpoints that `text` stands for: `ip:port`, or `ip` at each of `ports`. None if it is neither, or cannot be dialled.
pub fn expand(text: &str, ports: &[u16]) -> Option<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = match text.parse::<IpAddr>() {
        Ok(ip) => ports.iter().map(|&port| SocketAddr::new(ip, port)).collect(),
        Err(_) => text.parse().into_iter().collect(),
    };
    let can_be_dialled = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
    (!addresses.is_empty() && addresses.iter().all(can_be_dialled)).then_some(addresses)
}

/// Whether dialling the endpoint reaches this agent's own listener, as far as the addresses tell.
fn is_own(endpoint: SocketAddr, listen: SocketAddr) -> bool {
    endpoint.port() == listen.port()
        && (endpoint.ip() == listen.ip() || (listen.ip().is_unspecified() && endpoint.ip().is_loopback()))
}
