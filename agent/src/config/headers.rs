//! `[headers]`: what requests and responses are told about this hop.

use super::{Forwarding, Headers, document::Section, value};

pub(super) fn headers(section: &mut Section<'_>) -> Headers {
    const FORWARDING: &[(&str, Forwarding)] =
        &[("append", Forwarding::Append), ("replace", Forwarding::Replace), ("off", Forwarding::Off)];
    let default = Headers::default();
    Headers {
        via: section.read("via", value::via_or_off).unwrap_or(default.via),
        x_forwarded: section.read("x_forwarded", value::one_of(FORWARDING)).unwrap_or(default.x_forwarded),
        forwarded: section.read("forwarded", value::one_of(FORWARDING)).unwrap_or(default.forwarded),
        request_id_to_client: section
            .read("request_id_to_client", value::boolean)
            .unwrap_or(default.request_id_to_client),
    }
}
