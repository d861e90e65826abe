//! `[headers]`: header fields that describe this hop.

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

/// RFC 9110 §7.6.3: a pseudonym, or a host with an optional port.
fn via() -> value::Value<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:[]".contains(&byte);
    let is_name = move |text: &str| !text.is_empty() && text.bytes().all(is_allowed);
    value::string(r#"a name without spaces, such as "penstock""#, is_name)
}
