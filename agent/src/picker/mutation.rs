//! Applies an EPP's header mutation to the headers of a request or a response, as Envoy does, removals first.
//!
//! Sets `:path` of a request and `:status` of a response; other pseudo-headers are never changed, and none is removed.
//! Never changes the fields that [`may_be_mutated`] names. Invalid names and values are skipped and
//! counted. Empty values are set whatever `keep_empty_value` says, because Envoy's ext_proc filter ignores that field, too.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, request, uri::PathAndQuery};
use penstock_proto::{
    core::{self, HeaderValueOption, header_value_option::HeaderAppendAction},
    ext_proc::HeaderMutation,
};

use super::message;
use crate::http::fields::may_be_mutated;

/// Applies the mutation of a request, with its path. Returns the number of entries that were skipped because they are invalid.
pub fn apply_to_request(mutation: &HeaderMutation, request: &mut request::Parts) -> usize {
    let mut invalid = apply(mutation, &mut request.headers);
    for change in mutation.set_headers.iter().filter_map(|option| new_path(option, &request.uri)).collect::<Vec<_>>() {
        match change {
            Ok(uri) => request.uri = uri,
            Err(Invalid) => invalid += 1,
        }
    }
    invalid
}

/// Applies the mutation of a response, with its status. Returns the number of entries that were skipped because they are invalid.
pub fn apply_to_response(mutation: &HeaderMutation, status: &mut StatusCode, headers: &mut HeaderMap) -> usize {
    let mut invalid = apply(mutation, headers);
    for option in &mutation.set_headers {
        match new_status(option, *status) {
            Some(Ok(new)) => *status = new,
            Some(Err(Invalid)) => invalid += 1,
            None => {}
        }
    }
    invalid
}

/// A value that a pseudo-header cannot have.
pub(super) struct Invalid;

/// The request's target with the path that the entry sets. Returns `None` if the entry sets no path, or the request's own.
pub(super) fn new_path(option: &HeaderValueOption, uri: &Uri) -> Option<Result<Uri, Invalid>> {
    let value = overwrites(option, ":path")?;
    let own = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if value == own.as_bytes() {
        return None;
    }
    // Origin form (RFC 9112 §3.2.1), which a request in another form does not have.
    let is_origin = value.starts_with(b"/") && value.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#');
    let path = PathAndQuery::try_from(value).ok().filter(|_| is_origin && own.starts_with('/'));
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = path;
    Some(if parts.path_and_query.is_some() { Uri::from_parts(parts).map_err(|_| Invalid) } else { Err(Invalid) })
}

/// The status that the entry sets instead of `own`. Statuses without content, and 1xx, are neither set nor replaced, because the
/// framing of the response follows from them.
fn new_status(option: &HeaderValueOption, own: StatusCode) -> Option<Result<StatusCode, Invalid>> {
    let value = overwrites(option, ":status")?;
    if value == own.as_str().as_bytes() {
        return None;
    }
    let is_framed = |status: &StatusCode| {
        let bodiless = [StatusCode::NO_CONTENT, StatusCode::RESET_CONTENT, StatusCode::NOT_MODIFIED];
        (200..600).contains(&status.as_u16()) && !bodiless.contains(status)
    };
    let new = StatusCode::from_bytes(value).ok().filter(is_framed).filter(|_| is_framed(&own));
    Some(new.ok_or(Invalid))
}

/// The value that the entry sets for this pseudo-header, which is there.
fn overwrites<'o>(option: &'o HeaderValueOption, name: &str) -> Option<&'o [u8]> {
    let header = option.header.as_ref().filter(|header| header.key.eq_ignore_ascii_case(name))?;
    let action = action(option);
    let overwrites =
        matches!(action, HeaderAppendAction::OverwriteIfExists | HeaderAppendAction::OverwriteIfExistsOrAdd);
    overwrites.then(|| message::value(header))
}

/// Applies the mutation to fields. Returns the number of entries that were skipped because their name or value is invalid.
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
        if is_echo(header, option, headers) {
            continue;
        }
        let value = HeaderValue::from_bytes(message::value(header));
        match (classify(&header.key), value) {
            (Field::Protected, _) => {}
            (Field::Header(name), Ok(value)) => set(headers, name, value, action(option)),
            (Field::Invalid, _) | (_, Err(_)) => invalid += 1,
        }
    }
    invalid
}

/// Whether the entry sets a field to a value that it has. EPPs send every header back, of a repeated one only the last value: such an
/// echo must not remove the other values.
pub(super) fn is_echo(header: &core::HeaderValue, option: &HeaderValueOption, headers: &HeaderMap) -> bool {
    let value = message::value(header);
    headers.get_all(header.key.as_str()).iter().any(|present| present == value)
        && action(option) != HeaderAppendAction::AppendIfExistsOrAdd
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
    if may_be_mutated(&name) { Field::Header(name) } else { Field::Protected }
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
    if overwrites {
        let _ = headers.try_insert(name, value);
    }
}

#[cfg(test)]
mod tests;
