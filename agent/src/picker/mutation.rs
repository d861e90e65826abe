//! Applying the EPP's header mutation to a head.
//!
//! Given a `HeaderMutation` and the headers of a request or a response, it changes the headers as Envoy would, removals first.
//! The names that say where and how a message travels are never touched: pseudo-headers, `host`, framing, hop-by-hop fields,
//! `x-envoy-*`. Nothing fails: what is no header is skipped, and counted. An empty value is a value, whatever
//! `keep_empty_value` says: Envoy's ext_proc filter does not look at that field either.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use penstock_proto::{
    core::{HeaderValueOption, header_value_option::HeaderAppendAction},
    ext_proc::HeaderMutation,
};

use super::message;

/// Returns how many entries were skipped because their name or value cannot be in a header.
pub fn apply(mutation: &HeaderMutation, headers: &mut HeaderMap) -> usize {
    let mut invalid = 0;
    for name in &mutation.remove_headers {
        match target(name) {
            Target::Header(name) => drop(headers.remove(name)),
            Target::Protected => {}
            Target::Invalid => invalid += 1,
        }
    }
    for option in &mutation.set_headers {
        let Some(header) = &option.header else {
            invalid += 1;
            continue;
        };
        let value = HeaderValue::from_bytes(message::value(header));
        match (target(&header.key), value) {
            (Target::Protected, _) => {}
            (Target::Header(name), Ok(value)) => set(headers, name, value, action(option)),
            (Target::Invalid, _) | (_, Err(_)) => invalid += 1,
        }
    }
    invalid
}

pub(super) enum Target {
    Header(HeaderName),
    /// Not the EPP's to change: the agent computes it, or it belongs to one connection.
    Protected,
    Invalid,
}

pub(super) fn target(name: &str) -> Target {
    if name.starts_with(':') {
        return Target::Protected;
    }
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else { return Target::Invalid };
    let protected = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("http2-settings"),
    ];
    if name.as_str().starts_with("x-envoy-") || protected.contains(&name) {
        Target::Protected
    } else {
        Target::Header(name)
    }
}

/// `append` decides where it is given. Without it, action 0 is what a picker sends that says nothing, and that overwrites.
pub(super) fn action(option: &HeaderValueOption) -> HeaderAppendAction {
    match (option.append, option.append_action()) {
        (Some(true), _) => HeaderAppendAction::AppendIfExistsOrAdd,
        (_, HeaderAppendAction::AppendIfExistsOrAdd) => HeaderAppendAction::OverwriteIfExistsOrAdd,
        (_, action) => action,
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue, action: HeaderAppendAction) {
    let overwrites = match action {
        HeaderAppendAction::AppendIfExistsOrAdd => {
            // A map takes 32768 fields; the limits on mutations are far below.
            let _ = headers.try_append(name, value);
            return;
        }
        HeaderAppendAction::AddIfAbsent => !headers.contains_key(&name),
        HeaderAppendAction::OverwriteIfExists => headers.contains_key(&name),
        HeaderAppendAction::OverwriteIfExistsOrAdd => true,
    };
    // Pickers send every header back, of a repeated one only the last value: that is an echo and not a wish.
    let echo = headers.get_all(&name).iter().any(|present| present == value);
    if overwrites && !echo {
        let _ = headers.try_insert(name, value);
    }
}

#[cfg(test)]
mod tests;
