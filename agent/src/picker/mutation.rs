//! Applies an EPP's header mutation to the headers of a request or a response, as Envoy does, removals first.
//!
//! Never changes pseudo-headers, `host`, framing and hop-by-hop fields, and `x-envoy-*`. Invalid names and values are skipped and
//! counted. Empty values are set whatever `keep_empty_value` says, because Envoy's ext_proc filter ignores that field, too.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use penstock_proto::{
    core::{HeaderValueOption, header_value_option::HeaderAppendAction},
    ext_proc::HeaderMutation,
};

use super::message;

/// Applies the mutation. Returns the number of entries that were skipped because their name or value is invalid.
pub fn apply(mutation: &HeaderMutation, headers: &mut HeaderMap) -> usize {
    let mut invalid = 0;
    for name in &mutation.remove_headers {
        match classify(name) {
            Field::Header(name) => drop(headers.remove(name)),
            Field::Protected => {}
            Field::Invalid => invalid += 1,
        }
    }
    for option in &mutation.set_headers {
        let Some(header) = &option.header else {
            invalid += 1;
            continue;
        };
        let value = HeaderValue::from_bytes(message::value(header));
        match (classify(&header.key), value) {
            (Field::Protected, _) => {}
            (Field::Header(name), Ok(value)) => set(headers, name, value, action(option)),
            (Field::Invalid, _) | (_, Err(_)) => invalid += 1,
        }
    }
    invalid
}

pub(super) enum Field {
    Header(HeaderName),
    /// A field that the EPP may not change: the agent computes it, or it belongs to one connection.
    Protected,
    Invalid,
}

pub(super) fn classify(name: &str) -> Field {
    if name.starts_with(':') {
        return Field::Protected;
    }
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else { return Field::Invalid };
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
        Field::Protected
    } else {
        Field::Header(name)
    }
}

/// The action of an entry. `append` takes precedence. Without it, action 0 is the default of an EPP that sets no action, and
/// overwrites.
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
            // A map holds up to 32768 fields; the limits on mutations are far below.
            let _ = headers.try_append(name, value);
            return;
        }
        HeaderAppendAction::AddIfAbsent => !headers.contains_key(&name),
        HeaderAppendAction::OverwriteIfExists => headers.contains_key(&name),
        HeaderAppendAction::OverwriteIfExistsOrAdd => true,
    };
    // EPPs send every header back, of a repeated one only the last value. Such an echo must not remove the other values.
    let echo = headers.get_all(&name).iter().any(|present| present == value);
    if overwrites && !echo {
        let _ = headers.try_insert(name, value);
    }
}

#[cfg(test)]
mod tests;
