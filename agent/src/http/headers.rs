//! Prepares heads for forwarding: removes what [`fields`](super::fields) does not let pass, and adds the agent's own fields.
//!
//! Pure functions over a `HeaderMap`. What the endpoint may trust about the client depends on [`Forwarding`]: with `append` the last
//! element of `X-Forwarded-For` and `Forwarded` is the agent's, with `replace` everything, with `off` nothing.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header};

use super::{
    date,
    fields::{FieldPolicy, filter_response_head, remove_if, same},
    head::joined,
};
use crate::config::{Forwarding, Headers};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
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
    /// The client's address, as the endpoint is told.
    pub client: IpAddr,
    /// The version in which the client sent it, for `Via`.
    pub version: Version,
    /// Whether it came by TLS, so that its scheme is https.
    pub tls: bool,
}

impl Arrival {
    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

/// Prepares a client's headers for forwarding: removes what clients may not set, adds forwarding headers.
pub fn prepare_request(headers: &mut HeaderMap, arrival: &Arrival, policy: &FieldPolicy, settings: &Headers) {
    // First, so that the client's Connection cannot remove a field that is added below.
    policy.filter_client_head(headers);
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
    filter_response_head(headers);
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
