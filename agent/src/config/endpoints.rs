//! The sources of a pool's endpoints: `endpoints`, `endpoints_dns`, `endpoints_file`, and `ports` for addresses without a port.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
};

use serde::Deserialize;
use serde_json::{Value as Json, json};
use thiserror::Error;
use toml::de::DeValue;

use super::{
    document::Section,
    settings::SettingKind as _,
    value::{self, Custom, Expected, List, Parsed, host, integer},
};

/// The maximum number of target ports of an InferencePool.
const MAX_PORTS: usize = 8;

const LISTED: &str = "an array of ip:port";

/// An endpoint that is listed in a pool or in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedEndpoint {
    /// Where it accepts connections.
    pub address: SocketAddr,
    /// Name of the node that it runs on.
    pub node: Option<String>,
    /// Name of the zone that it runs in.
    pub zone: Option<String>,
    /// It gets no new requests; running ones may finish.
    pub draining: bool,
}

impl From<SocketAddr> for ListedEndpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address, node: None, zone: None, draining: false }
    }
}

/// Endpoints that DNS knows: each address of the name, with each of the ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedEndpoints {
    /// A host name, which is looked up again when its records expire.
    pub name: String,
    /// At least one.
    pub ports: Vec<u16>,
}

fn port() -> List<u16> {
    integer(1..=u16::MAX).list("an array of port numbers")
}

pub(super) fn ports() -> Custom<Vec<u16>> {
    Custom {
        words: "an array of port numbers",
        schema: json!({
            "type": "array",
            "items": { "type": "integer", "minimum": 1, "maximum": u16::MAX },
            "maxItems": MAX_PORTS,
            "uniqueItems": true,
        }),
        read: |section, key| {
            let ports = port().read(section, key)?;
            if ports.len() > MAX_PORTS {
                section.reject(key, format_args!("{} ports", ports.len()), format_args!("at most {MAX_PORTS}"));
            }
            for (index, port) in ports.iter().enumerate().filter(|(index, port)| ports[..*index].contains(port)) {
                section.reject(&format!("{key}[{index}]"), format_args!("{port} again"), "each port once");
            }
            Some(ports)
        },
        show: |ports| (!ports.is_empty()).then(|| json!(ports)),
    }
}

/// An address without a port is one endpoint at each of `ports`.
pub(super) fn listed() -> Custom<Vec<ListedEndpoint>> {
    let address = json!({ "type": "string" });
    let table = json!({
        "type": "object",
        "properties": {
            "address": { "type": "string" },
            "node": { "type": "string" },
            "zone": { "type": "string" },
            "draining": { "type": "boolean", "default": false },
        },
        "required": ["address"],
        "additionalProperties": false,
    });
    Custom {
        words: LISTED,
        schema: json!({ "type": "array", "items": { "anyOf": [address, table] } }),
        read: |section, key| {
            let ports = port().read(section, "ports").unwrap_or_default();
            let elements = section.list(key, LISTED, |value| listed_element(value, &ports));
            let mut endpoints: Vec<ListedEndpoint> = Vec::new();
            for (index, element) in elements.into_iter().enumerate() {
                for endpoint in element {
                    if endpoints.iter().any(|other| other.address == endpoint.address) {
                        let found = format_args!("\"{}\" again", endpoint.address);
                        section.reject(&format!("{key}[{index}]"), found, "each endpoint once");
                    }
                    endpoints.push(endpoint);
                }
            }
            Some(endpoints)
        },
        show: |endpoints| (!endpoints.is_empty()).then(|| endpoints.iter().map(show).collect()),
    }
}

/// An element of `endpoints` that is read as this endpoint.
fn show(endpoint: &ListedEndpoint) -> Json {
    let ListedEndpoint { address, node, zone, draining } = endpoint;
    if node.is_none() && zone.is_none() && !draining {
        return address.to_string().into();
    }
    let mut element = json!({ "address": address.to_string(), "draining": draining });
    for (key, name) in [("node", node), ("zone", zone)] {
        if let Some(name) = name {
            element[key] = name.clone().into();
        }
    }
    element
}

/// Rejects endpoints that are the agent's own listener: requests to them would loop.
pub(super) fn check_listed(section: &Section<'_>, ports: &[u16], listen: SocketAddr) {
    let mut view = section.view();
    let elements = view.list("endpoints", LISTED, |value| listed_element(value, ports));
    for (index, element) in elements.into_iter().enumerate() {
        for endpoint in element.into_iter().filter(|endpoint| is_own(endpoint.address, listen)) {
            let expected = format_args!("another server than listen.address ({listen})");
            section.reject(&format!("endpoints[{index}]"), format_args!("\"{}\"", endpoint.address), expected);
        }
    }
}

pub(super) fn named() -> Custom<Option<NamedEndpoints>> {
    Custom {
        words: "a host without port",
        schema: json!({ "type": "string" }),
        read: |section, key| {
            let name = host().read(section, key)?;
            if !section.has("ports") {
                section.reject(key, format_args!("{name:?} without ports"), "ports in the same section");
            }
            let ports = port().read(section, "ports").unwrap_or_default();
            Some(Some(NamedEndpoints { name, ports }))
        },
        // `ports` are a setting of their own.
        show: |named| named.as_ref().map(|named| named.name.clone().into()),
    }
}

/// An element of `endpoints`, in the configuration and in files.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "\"ip:port\" or { address = \"ip:port\", node = \"n1\", zone = \"a\", draining = false }"
)]
enum Listed {
    Address(String),
    Entry(EndpointEntry),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EndpointEntry {
    address: String,
    node: Option<String>,
    zone: Option<String>,
    #[serde(default)]
    draining: bool,
}

impl EndpointEntry {
    /// The endpoints at each of `ports`. The error is an address that cannot be parsed.
    fn endpoints(self, ports: &[u16]) -> Result<Vec<ListedEndpoint>, String> {
        let Self { address, node, zone, draining } = self;
        // A template without a value produces an empty string.
        let (node, zone) = (node.filter(|node| !node.is_empty()), zone.filter(|zone| !zone.is_empty()));
        let endpoint = |address| ListedEndpoint { address, node: node.clone(), zone: zone.clone(), draining };
        expand(&address, ports).map(|all| all.into_iter().map(endpoint).collect()).ok_or(address)
    }
}

impl From<Listed> for EndpointEntry {
    fn from(listed: Listed) -> Self {
        match listed {
            Listed::Address(address) => Self { address, node: None, zone: None, draining: false },
            Listed::Entry(entry) => entry,
        }
    }
}

fn listed_element(value: &DeValue<'_>, ports: &[u16]) -> Parsed<Vec<ListedEndpoint>> {
    const EXPECTED: &str =
        r#"{ address = "ip:port", node = "n1", zone = "a", draining = false }, all but address optional"#;
    let deserializer = toml::de::ValueDeserializer::from(toml::Spanned::new(0..0, value.clone()));
    let entry = match Listed::deserialize(deserializer) {
        Ok(listed) => EndpointEntry::from(listed),
        Err(_) if matches!(value, DeValue::Table(_)) => return Err(Expected(EXPECTED.into())),
        Err(_) => return Err(Expected(value::ENDPOINT.into())),
    };
    entry.endpoints(ports).map_err(|_| Expected(value::ENDPOINT.into()))
}

/// An error in a file of endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EndpointsError {
    /// Not TOML, or not an array `endpoints`.
    #[error("line {line}: {message}")]
    Toml {
        /// From 1.
        line: usize,
        /// The parser's text.
        message: String,
    },
    /// Not JSON, or not an object with `endpoints`: the parser's text, with line and column.
    #[error("{0}")]
    Json(String),
    /// An entry that is not the address of a server.
    #[error("endpoints[{index}]: found {found:?}, expected ip:port of a server, or ip where the pool has ports")]
    Address {
        /// The entry's, from 0.
        index: usize,
        /// Its text.
        found: String,
    },
    /// An entry that reaches the agent itself, so that requests would loop.
    #[error("endpoints[{index}]: found \"{found}\", expected another server than listen.address ({listen})")]
    Own {
        /// The entry's, from 0.
        index: usize,
        /// The entry.
        found: SocketAddr,
        /// The agent's own address that the entry reaches.
        listen: SocketAddr,
    },
}

/// The syntax of a file of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointsFormat {
    /// `endpoints = [...]`, as in a pool of the configuration.
    Toml,
    /// `{"endpoints": [...]}`, with the same elements.
    Json,
}

impl EndpointsFormat {
    /// `.json` is JSON; every other name is TOML.
    pub fn of(path: &Path) -> Self {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            Self::Json
        } else {
            Self::Toml
        }
    }
}

/// Parses a file of endpoints: `endpoints = [...]` as in a pool, and nothing else. The list is required, so that a partly written
/// file is not an empty pool.
pub fn parse_endpoints(
    text: &str,
    format: EndpointsFormat,
    ports: &[u16],
    listen: SocketAddr,
) -> Result<Vec<ListedEndpoint>, EndpointsError> {
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
        let listed =
            EndpointEntry::from(listed).endpoints(ports).map_err(|found| EndpointsError::Address { index, found })?;
        if let Some(own) = listed.iter().find(|endpoint| is_own(endpoint.address, listen)) {
            return Err(EndpointsError::Own { index, found: own.address, listen });
        }
        endpoints.extend(listed);
    }
    Ok(endpoints)
}

/// Returns the endpoints of `text`: `ip:port`, or `ip` at each of `ports`. Returns `None` if it is neither, or no address to
/// connect to.
fn expand(text: &str, ports: &[u16]) -> Option<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> = match text.parse::<IpAddr>() {
        Ok(ip) => ports.iter().map(|&port| SocketAddr::new(ip, port)).collect(),
        Err(_) => text.parse().into_iter().collect(),
    };
    let can_be_dialled = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
    (!addresses.is_empty() && addresses.iter().all(can_be_dialled)).then_some(addresses)
}

/// Returns whether connecting to the endpoint reaches the agent's own listener, judging by the addresses.
pub fn is_own(endpoint: SocketAddr, listen: SocketAddr) -> bool {
    crate::listeners::accepts(listen, endpoint)
}
