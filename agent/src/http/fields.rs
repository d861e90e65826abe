//! Which header and trailer fields pass between client, EPP and endpoint. The lists and rules of docs/headers.md are here and nowhere
//! else; the agent's own fields that forwarding adds are in [`headers`](super::headers).
//!
//! [`FieldPolicy`] is applied to a client's head when it is received, and to its trailers and the EPP's fields before the request goes
//! to an endpoint; [`filter_response_head`] and [`filter_trailers`] to what the endpoint sends. Names are compared with `_` equal to `-`, because servers that map names to variables do the same.

use http::{HeaderMap, HeaderName, header};

use super::head::joined;
use crate::config::{ALL_HINTS, ClientHint, Config, Picker};

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
const CONTROL: [&str; 13] = [
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

/// Prefixes of the control headers that carry the pick, its scores and the endpoint that served.
const PICK_PREFIXES: [&str; 2] = ["x-gateway-destination-endpoint", "x-llm-d-destination-endpoint"];

/// Prefix of the control headers by which an Envoy talks to its upstreams. The EPP cannot set them either.
const ENVOY_PREFIX: &str = "x-envoy-";

/// Set only on the agent's own answers: the reason why no endpoint answered.
pub const X_PENSTOCK_REASON: HeaderName = HeaderName::from_static("x-penstock-reason");

/// Set only for EPPs: the length of a body that is abridged.
pub const X_PENSTOCK_BODY_LENGTH: HeaderName = HeaderName::from_static("x-penstock-body-length");

/// Fields not allowed in trailers: they frame a message, describe its content, route or authenticate it, or control its handling, and
/// would mislead a recipient that merges them into the head (RFC 9110 §6.5.1).
const FORBIDDEN_TRAILERS: [&str; 42] = [
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-range",
    "content-type",
    "cookie",
    "date",
    "expect",
    "expires",
    "forwarded",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "location",
    "max-forwards",
    "origin",
    "pragma",
    "range",
    "referer",
    "retry-after",
    "set-cookie",
    "trailer",
    "traceparent",
    "tracestate",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "x-penstock-reason",
    "x-real-ip",
    "x-request-id",
];

/// What clients ask of the EPP by each hint: names of fields, or prefixes of them. A client may send those that `headers.client_hints`
/// names.
fn hint_fields(hint: ClientHint) -> &'static [&'static str] {
    match hint {
        ClientHint::Objective => &["x-gateway-inference-objective", "x-llm-d-inference-objective"],
        ClientHint::FairnessId => &["x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id"],
        ClientHint::ModelRewrite => &["x-gateway-model-name-rewrite", "x-llm-d-model-name-rewrite"],
        ClientHint::Latency => &["x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-"],
    }
}

/// Whether an EPP's mutation may set or remove the field. The others are computed by the agent, say that the agent itself answers, or
/// belong to one connection.
pub fn may_be_mutated(name: &HeaderName) -> bool {
    let protected = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        X_PENSTOCK_REASON,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("http2-settings"),
    ];
    !name.as_str().starts_with(ENVOY_PREFIX) && !protected.contains(name)
}

/// The rules as configured, for requests of every pool.
#[derive(Debug)]
pub struct FieldPolicy {
    /// The fields in which EPPs return their picks: `picker.header` of every pool, and the protocol's own.
    picks: Vec<HeaderName>,
    /// `bbr.model_header` and `bbr.base_model_header`, which only the agent may set.
    models: [HeaderName; 2],
    /// `headers.client_certificate`, which only the agent may set.
    certificate: Option<HeaderName>,
    /// The fields of the hints that clients may not set.
    refused_hints: Vec<&'static str>,
}

impl FieldPolicy {
    /// The rules of this configuration, for all of its pools.
    pub fn new(config: &Config) -> Self {
        let configured = config.pools.iter().filter_map(|pool| match &pool.picker {
            Picker::Epp(epp) => Some(epp.header.clone()),
            Picker::Builtin => None,
        });
        let mut picks: Vec<_> = configured.chain([HeaderName::from_static("x-gateway-destination-endpoint")]).collect();
        picks.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        picks.dedup();
        let refused = ALL_HINTS.iter().filter(|hint| !config.headers.client_hints.contains(hint));
        Self {
            picks,
            models: [config.bbr.header.clone(), config.bbr.base_model_header.clone()],
            certificate: config.headers.client_certificate.clone(),
            refused_hints: refused.flat_map(|&hint| hint_fields(hint)).copied().collect(),
        }
    }

    /// Removes from a client's head what concerns its connection alone, and every field by which it could impersonate the gateway, the
    /// EPP or the agent, whichever pool the request goes to.
    pub fn filter_client_head(&self, head: &mut HeaderMap) {
        remove_hop_by_hop(head);
        remove_if(head, |name| name.contains('_') && FRAMING.iter().any(|field| same(name, field)));
        self.remove_reserved(head);
    }

    /// Filters a client's trailers by the same rules as its head.
    pub fn filter_client_trailers(&self, trailers: &mut HeaderMap) {
        filter_trailers(trailers);
        self.remove_reserved(trailers);
    }

    /// Removes what no endpoint may get from the fields of a request that an EPP has mutated: the pick, which is meant for the agent,
    /// and `x-penstock-body-length` if the EPP echoed it. What the EPP says about other endpoints (prefill and the like) stays.
    pub fn filter_picked_head(&self, head: &mut HeaderMap) {
        remove_if(head, |name| {
            PICK_PREFIXES.iter().any(|pick| begins(name, pick))
                || self.picks.iter().chain([&X_PENSTOCK_BODY_LENGTH]).any(|field| same(name, field.as_str()))
        });
    }

    /// Removes the control headers and what clients may not ask of the EPP.
    fn remove_reserved(&self, fields: &mut HeaderMap) {
        remove_if(fields, |name| {
            PICK_PREFIXES.iter().chain(&[ENVOY_PREFIX]).chain(&self.refused_hints).any(|prefix| begins(name, prefix))
                || CONTROL.iter().any(|control| same(name, control))
                || self.picks.iter().chain(&self.models).chain(&self.certificate).any(|own| same(name, own.as_str()))
        });
    }
}

/// Removes from an endpoint's head what concerns its connection alone, and the field by which it could pose as the agent.
pub fn filter_response_head(head: &mut HeaderMap) {
    remove_hop_by_hop(head);
    head.remove(X_PENSTOCK_REASON);
}

/// Removes forbidden trailers of either side; keeps others such as digests and the gRPC status.
pub fn filter_trailers(trailers: &mut HeaderMap) {
    remove_hop_by_hop(trailers);
    remove_if(trailers, |name| {
        begins(name, "x-forwarded-") || FORBIDDEN_TRAILERS.iter().any(|field| same(name, field))
    });
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

#[cfg(test)]
pub(super) mod tests;
