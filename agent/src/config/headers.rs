//! `[headers]`: what requests and responses are told about this hop.

use super::{
    settings::{choice, settings},
    value,
};

settings! {
    /// What requests and responses are told about this hop.
    pub struct Headers {
        /// Name of this hop in `Via`, of requests and responses.
        pub via: Option<String> = Some("penstock".to_owned()) => via().or_off(),
        /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port` of requests.
        pub x_forwarded: Forwarding = Forwarding::Append => value::choice(),
        /// `Forwarded` (RFC 7239) of requests.
        pub forwarded: Forwarding = Forwarding::Off => value::choice(),
        /// Whether responses carry the `x-request-id` of their request.
        pub request_id_to_client: bool = false => value::boolean(),
    }
}

choice! {
    /// Who is believed about where a request came from.
    pub enum Forwarding {
        /// What the client says is kept, and this hop's word is put after it, or where it says nothing: for an agent that only
        /// proxies can reach. Whoever reads it may trust the last element of a list and no other.
        Append = "append",
        /// What the client says is dropped: for an agent that clients reach themselves.
        Replace = "replace",
        /// What the client says goes on as it is, and nothing is added.
        Off = "off",
    }
}

/// RFC 9110 §7.6.3: a pseudonym, or a host with an optional port.
fn via() -> value::Value<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:[]".contains(&byte);
    let is_name = move |text: &str| !text.is_empty() && text.bytes().all(is_allowed);
    value::string(r#"a name without blanks, such as "penstock""#, is_name)
}
