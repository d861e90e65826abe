//! `[headers]`: header fields that describe this hop.

use http::HeaderName;
use serde_json::json;

use super::{
    settings::{choice, settings},
    value,
};

settings! {
    /// Header fields that describe this hop to endpoints and clients.
    pub struct Headers {
        /// Name of this agent in `Via` of requests and responses.
        pub via: Option<String> = Some("penstock".to_owned()) => via().or_off(),
        /// How `X-Forwarded-For`, `-Proto`, `-Host` and `-Port` of requests are set.
        pub x_forwarded: Forwarding = Forwarding::Append => value::choice(),
        /// How `Forwarded` (RFC 7239) of requests is set.
        pub forwarded: Forwarding = Forwarding::Off => value::choice(),
        /// What clients may ask of the EPP; the fields of the others are removed from requests. docs/headers.md lists them.
        pub client_hints: Vec<ClientHint> = ALL_HINTS.to_vec()
            => value::choice()
                .list(r#"an array of "objective", "fairness_id", "model_rewrite" and "latency""#)
                .example(json!(["objective"])),
        /// Field in which EPPs and endpoints get the certificate of a client of `[listen.tls]`, in the form of Envoy's
        /// `X-Forwarded-Client-Cert`: `Hash=...;Subject="CN=...";URI=...;DNS=...`. A client's own field of this name is removed. Unset:
        /// they do not get it.
        pub client_certificate: Option<HeaderName> = None => value::header_name().optional("x-forwarded-client-cert"),
        /// Whether responses carry the `x-request-id` of their request.
        pub request_id_to_client: bool = false => value::boolean(),
    }
}

choice! {
    /// What happens to the forwarding fields of a request.
    pub enum Forwarding {
        /// The client's values are kept; the agent appends its own element to lists and sets the other fields where the client did
        /// not. For agents that only trusted proxies can reach: only the last element of a list is trustworthy.
        Append = "append",
        /// The client's values are replaced. For agents that clients can reach directly.
        Replace = "replace",
        /// The client's values are forwarded unchanged, and nothing is added.
        Off = "off",
    }
}

choice! {
    /// What a client asks of the EPP.
    pub enum ClientHint {
        /// The request's objective, from which its priority follows.
        Objective = "objective",
        /// The flow between whose requests the EPP shares capacity fairly.
        FairnessId = "fairness_id",
        /// Another model than the one that the body names.
        ModelRewrite = "model_rewrite",
        /// The times to the first and between later tokens that the request needs.
        Latency = "latency",
    }
}

pub(crate) const ALL_HINTS: [ClientHint; 4] =
    [ClientHint::Objective, ClientHint::FairnessId, ClientHint::ModelRewrite, ClientHint::Latency];

/// RFC 9110 §7.6.3: a pseudonym, or a host with an optional port.
fn via() -> value::Value<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:[]".contains(&byte);
    let is_name = move |text: &str| !text.is_empty() && text.bytes().all(is_allowed);
    value::string(r#"a name without spaces, such as "penstock""#, is_name)
}
