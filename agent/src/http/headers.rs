//! Header fields that belong to one hop, fields that only the agent may set, and fields that it adds.
//!
//! Pure functions over a `HeaderMap`. Names compare with `_` as `-`: servers that map names to variables do the same, and
//! `x_gateway_destination_endpoint` must not get past the filter.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Version, header};

use super::head::joined;

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
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Makes a client's fields fit to travel: hop-by-hop and control fields out, forwarding fields in.
///
/// `model` is the configured header that carries the model, which is the agent's to set.
pub fn prepare_request(headers: &mut HeaderMap, version: Version, client: IpAddr, model: &HeaderName) {
    // What the client asks to remove goes first, so that it cannot name a field that is added below.
    remove_hop_by_hop(headers);
    remove_control(headers, model, model);
    add_request_id(headers);
    add_forwarded(headers, client);
    add_via(headers, version);
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
    let is_control = |name: &HeaderName| {
        let name = name.as_str();
        CONTROL_PREFIXES.iter().any(|prefix| begins(name, prefix))
            || CONTROL
                .iter()
                .chain(&[destination.as_str(), model.as_str()])
                .any(|control| name.len() == control.len() && begins(name, control))
    };
    let found: Vec<HeaderName> = headers.keys().filter(|name| is_control(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Whether `name` begins with `prefix`, `_` being the same as `-`.
fn begins(name: &str, prefix: &str) -> bool {
    let dashed = |b: u8| if b == b'_' { b'-' } else { b };
    name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(|(a, b)| dashed(a) == dashed(b))
}

/// Sets `x-request-id` to a random UUID unless the client sent one.
pub fn add_request_id(headers: &mut HeaderMap) {
    if headers.get(X_REQUEST_ID).is_some_and(|id| !id.is_empty()) {
        return;
    }
    let mut text = uuid::Uuid::encode_buffer();
    let id = uuid::Uuid::new_v4().hyphenated().encode_lower(&mut text);
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(X_REQUEST_ID, id);
    }
}

/// Appends the client's address to `x-forwarded-for`; sets `x-forwarded-proto` to `http` when absent.
pub fn add_forwarded(headers: &mut HeaderMap, client: IpAddr) {
    append(headers, X_FORWARDED_FOR, &client.to_canonical().to_string());
    headers.entry(X_FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
}

/// Appends this hop to `via`, with the version that the message arrived in (RFC 9110 §7.6.3).
pub fn add_via(headers: &mut HeaderMap, received: Version) {
    let hop = match received {
        Version::HTTP_10 => "1.0 penstock",
        Version::HTTP_2 => "2 penstock",
        _ => "1.1 penstock",
    };
    append(headers, header::VIA, hop);
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
