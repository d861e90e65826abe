//! Where the endpoints of a pool come from: `endpoints`, `endpoints_dns`, `endpoints_file`, and `ports` for addresses that
//! have none of their own.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;
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

/// An element of `endpoints`, in the configuration and in files. Alone it is an address.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "\"ip:port\" or { address = \"ip:port\", node = \"n1\", zone = \"a\", draining = false }"
)]
enum Listed {
    Address(String),
    Entry(Entry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: String,
    node: Option<String>,
    zone: Option<String>,
    #[serde(default)]
    draining: bool,
}

impl Entry {
    /// The endpoints that it stands for, or the address that is none.
    fn endpoints(self, ports: &[u16]) -> Result<Vec<Endpoint>, String> {
        let Self { address, node, zone, draining } = self;
        // What a template had no value for is not known.
        let (node, zone) = (node.filter(|node| !node.is_empty()), zone.filter(|zone| !zone.is_empty()));
        let endpoint = |address| Endpoint { address, node: node.clone(), zone: zone.clone(), draining };
        expand(&address, ports).map(|all| all.into_iter().map(endpoint).collect()).ok_or(address)
    }
}

impl From<Listed> for Entry {
    fn from(listed: Listed) -> Self {
        match listed {
            Listed::Address(address) => Self { address, node: None, zone: None, draining: false },
            Listed::Entry(entry) => entry,
        }
    }
}

fn listed_element(value: &DeValue<'_>, ports: &[u16]) -> Parsed<Vec<Endpoint>> {
    const EXPECTED: &str =
        r#"{ address = "ip:port", node = "n1", zone = "a", draining = false }, all but address optional"#;
    let deserializer = toml::de::ValueDeserializer::from(toml::Spanned::new(0..0, value.clone()));
    let entry = match Listed::deserialize(deserializer) {
        Ok(listed) => Entry::from(listed),
        Err(_) if matches!(value, DeValue::Table(_)) => return Err(Expected(EXPECTED.into())),
        Err(_) => return Err(value::not_an_endpoint()),
    };
    entry.endpoints(ports).map_err(|_| value::not_an_endpoint())
}

/// What is wrong with a file of endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EndpointsError {
    #[error("line {line}: {message}")]
    Toml { line: usize, message: String },
    #[error("{0}")]
    Json(String),
    #[error("endpoints[{index}]: found {found:?}, expected ip:port of a server, or ip where the pool has ports")]
    Address { index: usize, found: String },
    #[error("endpoints[{index}]: found \"{found}\", expected another server than listen.address ({listen})")]
    Own { index: usize, found: SocketAddr, listen: SocketAddr },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointsFormat {
    Toml,
    Json,
}

impl EndpointsFormat {
    /// By the name: `.json`, and anything else is TOML.
    pub fn of(path: &Path) -> Self {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            Self::Json
        } else {
            Self::Toml
        }
    }
}

/// The endpoints of a file: `endpoints = [...]` as a pool has it, and nothing else. The list must be there, so that a file
/// that has only begun to be written is not an empty pool.
pub fn parse_endpoints(
    text: &str,
    format: EndpointsFormat,
    ports: &[u16],
    listen: SocketAddr,
) -> Result<Vec<Endpoint>, EndpointsError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        endpoints: Vec<Listed>,
    }
    let file: File = match format {
        EndpointsFormat::Toml => toml::from_str(text).map_err(|error| EndpointsError::Toml {
            line: text[..error.span().map_or(0, |span| span.start)].matches('\n').count() + 1,
            message: error.message().replace('\n', ", "),
        })?,
        EndpointsFormat::Json => serde_json::from_str(text).map_err(|error| EndpointsError::Json(error.to_string()))?,
    };
    let mut endpoints = Vec::with_capacity(file.endpoints.len());
    for (index, listed) in file.endpoints.into_iter().enumerate() {
        let listed = Entry::from(listed).endpoints(ports).map_err(|found| EndpointsError::Address { index, found })?;
        if let Some(own) = listed.iter().find(|endpoint| is_own(endpoint.address, listen)) {
            return Err(EndpointsError::Own { index, found: own.address, listen });
        }
        endpoints.extend(listed);
    }
    Ok(endpoints)
}

/// The endpoints that `text` stands for: `ip:port`, or `ip` at each of `ports`. None if it is neither, or cannot be dialled.
fn expand(text: &str, ports: &[u16]) -> Option<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = match text.parse::<IpAddr>() {
        Ok(ip) => ports.iter().map(|&port| SocketAddr::new(ip, port)).collect(),
        Err(_) => text.parse().into_iter().collect(),
    };
    let can_be_dialled = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
    (!addresses.is_empty() && addresses.iter().all(can_be_dialled)).then_some(addresses)
}

/// Whether dialling the endpoint reaches the agent's own listener, as far as the addresses tell.
pub fn is_own(endpoint: SocketAddr, listen: SocketAddr) -> bool {
    crate::listeners::accepts(listen, endpoint)
}
