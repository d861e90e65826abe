//! Removes hop-by-hop headers and headers that only the agent may set, and adds those that forwarding needs.
//!
//! Pure functions over a `HeaderMap`. Names are compared with `_` equal to `-`, because servers that map names to
//! variables do the same. What the endpoint may trust about the client depends on [`Forwarding`]: with `append` the
//! last element of `X-Forwarded-For` and `Forwarded` is the agent's, with `replace` everything, with `off` nothing.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};

use super::{date, head::joined};
use crate::config::{ALL_HINTS, Forwarding, Headers};

/// Hop-by-hop headers: RFC 9110 §7.6.1, and those of proxy authentication (§11.7), which concern the next hop only.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Headers that Connection cannot remove, because removing them changes the message's meaning for the next hop.
const END_TO_END: [HeaderName; 4] =
    [header::HOST, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::CONTENT_ENCODING];

/// Framing headers. Their underscore variants are removed too, because a `content_length` could only contradict the
/// agent's.
const FRAMING: [&str; 4] = ["content-length", "transfer-encoding", "host", "connection"];

/// Headers between gateway, picker and endpoint. From a client they would bypass the picker.
pub(super) const CONTROL: [&str; 13] = [
    // The agent's own, for EPPs.
    "x-penstock-body-length",
    // Tells clients why the EPP dropped a request.
    "x-llm-d-request-dropped-reason",
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    // Dynamo's headers, by which its frontend selects workers.
    "x-worker-instance-id",
    "x-dynamo-routing-mode",
    "x-dynamo-prefill-worker-id",
    "x-dynamo-decode-worker-id",
    "x-dynamo-dp-rank",
    "x-dynamo-token-data",
    "x-dynamo-backend-instance-id",
];

/// Prefixes of control headers.
pub(super) const CONTROL_PREFIXES: [&str; 3] =
    ["x-gateway-destination-endpoint", "x-llm-d-destination-endpoint", "x-envoy-"];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Set only on the agent's own answers: the reason why no endpoint answered.
pub const X_PENSTOCK_REASON: HeaderName = HeaderName::from_static("x-penstock-reason");

/// Set only for EPPs: the length of a body that is abridged.
pub const X_PENSTOCK_BODY_LENGTH: HeaderName = HeaderName::from_static("x-penstock-body-length");

/// The ids of the agents that have forwarded a request.
pub const X_PENSTOCK_HOP: HeaderName = HeaderName::from_static("x-penstock-hop");

/// Whether the agent with this mark has already forwarded the request.
pub fn is_marked(headers: &HeaderMap, mark: &HeaderValue) -> bool {
    let marks = joined(headers, &X_PENSTOCK_HOP);
    marks.split(|&byte| byte == b',').any(|hop| hop.trim_ascii() == mark.as_bytes())
}

/// How a request reached the agent.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub client: IpAddr,
    pub version: Version,
    pub tls: bool,
}

impl Arrival {
    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

/// Prepares a client's headers for forwarding: removes hop-by-hop and control headers, adds forwarding headers.
///
/// `model` is the configured header that carries the model; only the agent may set it.
pub fn prepare_request(headers: &mut HeaderMap, arrival: &Arrival, model: &HeaderName, settings: &Headers) {
    // Headers named by Connection are removed first, so that the client cannot remove one that is added below.
    remove_hop_by_hop(headers);
    remove_if(headers, |name| name.contains('_') && FRAMING.iter().any(|field| same(name, field)));
    remove_control(headers, model, model);
    remove_hints(headers, settings);
    add_request_id(headers);
    add_x_forwarded(headers, arrival, settings.x_forwarded);
    add_forwarded(headers, arrival, settings.forwarded);
    add_via(headers, arrival.version, settings.via.as_deref());
}

/// Prepares an endpoint's response headers for the client. `request` are the headers of the request.
pub fn prepare_response(headers: &mut HeaderMap, version: Version, request: &HeaderMap, settings: &Headers) {
    prepare_interim(headers, version, settings);
    // RFC 9110 §6.6.1: a recipient that forwards a response without Date adds it.
    headers.entry(header::DATE).or_insert_with(date::now);
    if let Some(id) = request_id(request, settings) {
        headers.insert(X_REQUEST_ID, id.clone());
    }
}

/// Prepares the headers of an interim response (1xx) for the client.
pub fn prepare_interim(headers: &mut HeaderMap, version: Version, settings: &Headers) {
    remove_hop_by_hop(headers);
    headers.remove(X_PENSTOCK_REASON);
    add_via(headers, version, settings.via.as_deref());
}

/// Decrements Max-Forwards (RFC 9110 §7.6.2). Returns true if the request must not be forwarded further. Applies only
/// to OPTIONS: TRACE is not implemented, and for other methods the header has no meaning. An invalid value is left
/// unchanged.
pub fn is_last_forward(method: &Method, headers: &mut HeaderMap) -> bool {
    if method != Method::OPTIONS {
        return false;
    }
    let value = joined(headers, &header::MAX_FORWARDS);
    let digits = std::str::from_utf8(&value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let Some(left) = digits.and_then(|digits| digits.parse::<u64>().ok()) else { return false };
    headers.insert(header::MAX_FORWARDS, left.saturating_sub(1).into());
    left == 0
}

/// The request id, if the client gets it.
pub fn request_id<'h>(request: &'h HeaderMap, settings: &Headers) -> Option<&'h HeaderValue> {
    request.get(X_REQUEST_ID).filter(|_| settings.request_id_to_client)
}

/// Whether the header concerns a single connection.
pub fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(&name.as_str())
}

/// Removes hop-by-hop headers and those that Connection names, from a request or a response.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let options = joined(headers, &header::CONNECTION);
    for option in options.split(|&b| b == b',').map(<[u8]>::trim_ascii) {
        match HeaderName::from_bytes(option) {
            Ok(name) if !END_TO_END.contains(&name) => drop(headers.remove(name)),
            _ => {}
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Removes every header by which a client could impersonate the gateway or the picker.
pub fn remove_control(headers: &mut HeaderMap, destination: &HeaderName, model: &HeaderName) {
    remove_if(headers, |name| {
        CONTROL_PREFIXES.iter().any(|prefix| begins(name, prefix))
            || CONTROL.iter().chain(&[destination.as_str(), model.as_str()]).any(|control| same(name, control))
    });
}

/// Removes what clients may not ask of the EPP.
pub fn remove_hints(headers: &mut HeaderMap, settings: &Headers) {
    let refused = ALL_HINTS.iter().filter(|hint| !settings.client_hints.contains(hint));
    let fields: Vec<&str> = refused.flat_map(|hint| hint.fields()).copied().collect();
    if !fields.is_empty() {
        remove_if(headers, |name| fields.iter().any(|field| begins(name, field)));
    }
}

/// Removes the pick, which is meant for the agent only, and `x-penstock-body-length` if the EPP echoed it. What the EPP says about
/// other endpoints (prefill and the like) stays.
pub fn remove_pick(headers: &mut HeaderMap, destination: &HeaderName) {
    let picks = &CONTROL_PREFIXES[..2];
    let is_other = |name: &str| [destination, &X_PENSTOCK_BODY_LENGTH].iter().any(|other| same(name, other.as_str()));
    remove_if(headers, |name| picks.iter().any(|pick| begins(name, pick)) || is_other(name));
}

pub(super) fn remove_if(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    let found: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Whether the names are equal, treating `_` as `-`.
pub(super) fn same(name: &str, other: &str) -> bool {
    name.len() == other.len() && begins(name, other)
}

/// Whether `name` begins with `prefix`, treating `_` as `-`.
pub(super) fn begins(name: &str, prefix: &str) -> bool {
    let dashed = |b: u8| if b == b'_' { b'-' } else { b };
    name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(|(a, b)| dashed(a) == dashed(b))
}

/// Sets `x-request-id` to a random UUID unless the client sent one.
pub fn add_request_id(headers: &mut HeaderMap) {
    if headers.get(X_REQUEST_ID).is_some_and(|id| !id.is_empty()) {
        return;
    }
    let mut text = uuid::Uuid::encode_buffer();
    // It has to be unique, not unpredictable: a system call for each request would cost more.
    let random = uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes());
    let id = random.into_uuid().hyphenated().encode_lower(&mut text);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(X_REQUEST_ID, id);
    }
}

/// Appends to `x-forwarded-for`, and sets `-proto`, `-host` and `-port` unless present.
fn add_x_forwarded(headers: &mut HeaderMap, arrival: &Arrival, forwarding: Forwarding) {
    match forwarding {
        Forwarding::Off => return,
        Forwarding::Append => {}
        Forwarding::Replace => {
            let all = [X_FORWARDED_FOR, X_FORWARDED_PROTO, X_FORWARDED_HOST, X_FORWARDED_PORT];
            remove_if(headers, |name| all.iter().any(|field| same(name, field.as_str())));
        }
    }
    append(headers, X_FORWARDED_FOR, &arrival.client.to_canonical().to_string());
    let scheme = HeaderValue::from_static(arrival.scheme());
    headers.entry(X_FORWARDED_PROTO).or_insert(scheme);
    let Some(host) = headers.get(header::HOST).cloned() else { return };
    // The port fits the host and scheme that the fields name, which may be those of a proxy before this one.
    let host = headers.entry(X_FORWARDED_HOST).or_insert(host).clone();
    if !headers.contains_key(X_FORWARDED_PORT) {
        let secure = headers.get(X_FORWARDED_PROTO).is_some_and(|proto| {
            [&b"https"[..], b"wss"].iter().any(|scheme| proto.as_bytes().eq_ignore_ascii_case(scheme))
        });
        if let Ok(port) = HeaderValue::from_str(port(&host).unwrap_or(if secure { "443" } else { "80" })) {
            headers.insert(X_FORWARDED_PORT, port);
        }
    }
}

/// The port of a valid Host, as written.
fn port(host: &HeaderValue) -> Option<&str> {
    let (_, port) = host.to_str().ok()?.rsplit_once(':')?;
    (!port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())).then_some(port)
}

/// Adds this hop to `forwarded` (RFC 7239).
fn add_forwarded(headers: &mut HeaderMap, arrival: &Arrival, forwarding: Forwarding) {
    match forwarding {
        Forwarding::Off => return,
        // After an open quote, this hop's element would be a part of the client's.
        Forwarding::Append if is_quote_open(&joined(headers, &header::FORWARDED)) => {
            drop(headers.remove(header::FORWARDED));
        }
        Forwarding::Append => {}
        Forwarding::Replace => drop(headers.remove(header::FORWARDED)),
    }
    let mut element = match arrival.client.to_canonical() {
        IpAddr::V4(client) => format!("for={client}"),
        // RFC 7239 §6: an IPv6 address is in brackets, which need quotes.
        IpAddr::V6(client) => format!("for=\"[{client}]\""),
    };
    if let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()).filter(|host| !host.is_empty()) {
        element += &format!(";host=\"{host}\"");
    }
    element += &format!(";proto={}", arrival.scheme());
    append(headers, header::FORWARDED, &element);
}

/// Whether a list ends within a quoted string (RFC 9110 §5.6.4).
fn is_quote_open(list: &[u8]) -> bool {
    let (mut open, mut escaped) = (false, false);
    for byte in list {
        (open, escaped) = match byte {
            _ if escaped => (open, false),
            b'"' => (!open, false),
            b'\\' => (open, open),
            _ => (open, false),
        };
    }
    open
}

/// Appends this hop to `via`, with the version of the received message (RFC 9110 §7.6.3).
fn add_via(headers: &mut HeaderMap, received: Version, name: Option<&str>) {
    let Some(name) = name else { return };
    let version = match received {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    append(headers, header::VIA, &format!("{version} {name}"));
}

/// Appends to a list on one line: several readers of `x-forwarded-for` read only the first line.
fn append(headers: &mut HeaderMap, name: HeaderName, element: &str) {
    let mut list = joined(headers, &name);
    if !list.is_empty() {
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element.as_bytes());
    if let Ok(value) = HeaderValue::from_maybe_shared(bytes::Bytes::from(list)) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests;
