//! Header fields that belong to one hop, fields that only the agent may set, and fields that it adds.
//!
//! Pure functions over a `HeaderMap`. Names compare with `_` as `-`: servers that map names to variables do the same, and
//! `x_gateway_destination_endpoint` must not get past the filter.
//!
//! Whom the endpoint may believe about the client follows from the setting ([`Forwarding`]): with `append` the last element of
//! `X-Forwarded-For` and `Forwarded` is the agent's word and the rest is the client's; with `replace` all of it is the
//! agent's; with `off` none of it.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};

use super::{date, head::joined};
use crate::config::{Forwarding, Headers};

/// RFC 9110 §7.6.1, and the fields of a proxy's own authentication (§11.7), which concern the next hop only.
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

/// What Connection must not name, because removing it changes what the message means to the next hop.
const END_TO_END: [HeaderName; 4] =
    [header::HOST, header::CONTENT_LENGTH, header::CONTENT_TYPE, header::CONTENT_ENCODING];

/// Of these, not even look-alikes go on: nobody has a use for a `content_length` but to say another length than the agent's.
const FRAMING: [&str; 4] = ["content-length", "transfer-encoding", "host", "connection"];

/// Fields between gateway, picker and endpoint: from a client they would steer the request past the picker.
const CONTROL: [&str; 11] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    // Dynamo's, by which its frontend finds workers.
    "x-worker-instance-id",
    "x-dynamo-routing-mode",
    "x-dynamo-prefill-worker-id",
    "x-dynamo-decode-worker-id",
    "x-dynamo-dp-rank",
    "x-dynamo-token-data",
    "x-dynamo-backend-instance-id",
];

/// Families of control fields, by prefix.
const CONTROL_PREFIXES: [&str; 2] = ["x-gateway-destination-endpoint", "x-envoy-"];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Only the agent's own answers carry it: why it did not get one from an endpoint.
pub const X_PENSTOCK_REASON: HeaderName = HeaderName::from_static("x-penstock-reason");

/// The agents that have forwarded a request, each by an id of its own.
pub const X_PENSTOCK_HOP: HeaderName = HeaderName::from_static("x-penstock-hop");

/// Whether the request has been forwarded by the agent whose mark this is.
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

/// Makes a client's fields fit to travel: hop-by-hop and control fields out, forwarding fields in.
///
/// `model` is the configured header that carries the model, which is the agent's to set.
pub fn prepare_request(headers: &mut HeaderMap, arrival: &Arrival, model: &HeaderName, settings: &Headers) {
    // What the client asks to remove goes first, so that it cannot name a field that is added below.
    remove_hop_by_hop(headers);
    remove_if(headers, |name| name.contains('_') && FRAMING.iter().any(|field| same(name, field)));
    remove_control(headers, model, model);
    add_request_id(headers);
    add_x_forwarded(headers, arrival, settings.x_forwarded);
    add_forwarded(headers, arrival, settings.forwarded);
    add_via(headers, arrival.version, settings.via.as_deref());
}

/// Makes an endpoint's fields fit to travel back. `request` are the fields of the request that it answers.
pub fn prepare_response(headers: &mut HeaderMap, version: Version, request: &HeaderMap, settings: &Headers) {
    prepare_interim(headers, version, settings);
    // RFC 9110 §6.6.1: whoever forwards a response without a date adds it.
    headers.entry(header::DATE).or_insert_with(date::now);
    if let Some(id) = request_id(request, settings) {
        headers.insert(X_REQUEST_ID, id.clone());
    }
}

/// Makes the fields of an interim response (1xx) fit to travel back.
pub fn prepare_interim(headers: &mut HeaderMap, version: Version, settings: &Headers) {
    remove_hop_by_hop(headers);
    headers.remove(X_PENSTOCK_REASON);
    add_via(headers, version, settings.via.as_deref());
}

/// Counts this hop in Max-Forwards (RFC 9110 §7.6.2). True: the request must go no further. Only OPTIONS has it here: TRACE is not
/// implemented, and of other methods it means nothing. One that is no number is left alone.
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

/// The request's id where the client is to learn it.
pub fn request_id<'h>(request: &'h HeaderMap, settings: &Headers) -> Option<&'h HeaderValue> {
    request.get(X_REQUEST_ID).filter(|_| settings.request_id_to_client)
}

/// Whether the field concerns one connection only.
pub fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(&name.as_str())
}

/// Removes the hop-by-hop fields and those that Connection names, from a request or a response.
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

/// Removes every field by which a client could pose as the gateway or the picker.
pub fn remove_control(headers: &mut HeaderMap, destination: &HeaderName, model: &HeaderName) {
    remove_if(headers, |name| {
        CONTROL_PREFIXES.iter().any(|prefix| begins(name, prefix))
            || CONTROL.iter().chain(&[destination.as_str(), model.as_str()]).any(|control| same(name, control))
    });
}

/// Removes what a picker may have set for the agent alone: the pick is of no use to the endpoint, which gets what the picker
/// says about other endpoints (prefill and its like) as it was set.
pub fn remove_pick(headers: &mut HeaderMap, destination: &HeaderName) {
    remove_if(headers, |name| begins(name, CONTROL_PREFIXES[0]) || same(name, destination.as_str()));
}

pub(super) fn remove_if(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    let found: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Whether the two are the same name, `_` being the same as `-`.
pub(super) fn same(name: &str, other: &str) -> bool {
    name.len() == other.len() && begins(name, other)
}

/// Whether `name` begins with `prefix`, `_` being the same as `-`.
pub(super) fn begins(name: &str, prefix: &str) -> bool {
    let dashed = |b: u8| if b == b'_' { b'-' } else { b };
    name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(|(a, b)| dashed(a) == dashed(b))
}

/// Sets `x-request-id` to a random UUID unless the client sent one.
fn add_request_id(headers: &mut HeaderMap) {
    if headers.get(X_REQUEST_ID).is_some_and(|id| !id.is_empty()) {
        return;
    }
    let mut text = uuid::Uuid::encode_buffer();
    let id = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut text);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(X_REQUEST_ID, id);
    }
}

/// Adds `x-forwarded-for` (a list), `-proto`, `-host` and `-port` (which the first to set them sets).
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
    if !headers.contains_key(X_FORWARDED_PORT)
        && let Ok(port) = HeaderValue::from_str(port(&host).unwrap_or(if arrival.tls { "443" } else { "80" }))
    {
        headers.insert(X_FORWARDED_PORT, port);
    }
    headers.entry(X_FORWARDED_HOST).or_insert(host);
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
        Forwarding::Append => {}
        Forwarding::Replace => drop(headers.remove(header::FORWARDED)),
    }
    let mut element = match arrival.client.to_canonical() {
        IpAddr::V4(client) => format!("for={client}"),
        // RFC 7239 §6: in brackets, which are no token.
        IpAddr::V6(client) => format!("for=\"[{client}]\""),
    };
    if let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()).filter(|host| !host.is_empty()) {
        element += &format!(";host=\"{host}\"");
    }
    element += &format!(";proto={}", arrival.scheme());
    append(headers, header::FORWARDED, &element);
}

/// Appends this hop to `via`, with the version that the message arrived in (RFC 9110 §7.6.3).
fn add_via(headers: &mut HeaderMap, received: Version, name: Option<&str>) {
    let Some(name) = name else { return };
    let version = match received {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    append(headers, header::VIA, &format!("{version} {name}"));
}

/// Adds to a list, on one line: several readers of `x-forwarded-for` look at the first line only.
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
