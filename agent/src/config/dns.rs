//! `[dns]`: how names become addresses.

use super::{Dns, document::Section, value};

pub(super) fn dns(section: &mut Section<'_>) -> Dns {
    let default = Dns::default();
    let dns = Dns {
        servers: section.list("servers", "an array of ip:port", value::endpoint),
        timeout: section.read("timeout", value::duration).unwrap_or(default.timeout),
        min_ttl: section.read("min_ttl", value::duration).unwrap_or(default.min_ttl),
        max_ttl: section.read("max_ttl", value::duration).unwrap_or(default.max_ttl),
    };
    if dns.min_ttl > dns.max_ttl {
        let key = if section.has("min_ttl") { "min_ttl" } else { "max_ttl" };
        section.reject(key, "a min_ttl above max_ttl", "min_ttl up to max_ttl");
    }
    dns
}
