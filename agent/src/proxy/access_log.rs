//! The access log: one line for each request, pinned connection and adopted flow, with the target `penstock::access`.
//!
//! `fields!` declares a field with its documentation, and [`routed`] fills it from what the request has recorded ([`Record`], which
//! has what is known of the client's connection from its `Origin`, made in connection.rs and connection/http2.rs). A value that
//! neither has must be recorded first. The other three functions write the lines that have fewer fields. `cargo xtask settings` writes
//! docs/access-log.md from the declarations.

use std::{net::SocketAddr, time::Duration};

use http::{StatusCode, request};
use penstock_common::path::Path;
use tracing::field::{DisplayValue, display};

use super::record::Record;
use crate::{
    kernel::wire::{AdoptedFlow, Seen, Story},
    picker::metadata::Collected,
    steer::account::Account,
    text::{self, cut},
};

/// Declares the fields in the order in which they are written. A field that is `None` is not written.
macro_rules! fields {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty,)+) => {
        /// The fields of one line.
        #[derive(Default)]
        struct Line<'a> {
            $($(#[doc = $doc])+ $name: Option<$type>,)+
        }

        impl Line<'_> {
            fn write(&self) {
                tracing::info!(target: "penstock::access", $($name = self.$name.as_ref(),)+);
            }
        }

        /// The names of the fields and their documentation.
        #[cfg(test)]
        const FIELDS: &[(&str, &str)] = &[$((stringify!($name), concat!($($doc),+)),)+];
    };
}

fields! {
    /// `true` in the line of a pinned connection.
    pinned: bool,
    /// `true` in the line of a flow on path `wire` that another agent began, and this one adopted. It has no request fields; `took_us`
    /// ends with the last payload.
    adopted: bool,
    /// The client's address and port.
    client: DisplayValue<SocketAddr>,
    /// Who the client is by its certificate: the first URI or DNS name of it, or its subject. Only for clients that presented one.
    client_certificate: &'a str,
    /// The value of the request's `x-request-id`, the client's or the agent's.
    request_id: &'a str,
    /// The request's method.
    method: DisplayValue<&'a str>,
    /// The path of the request's target, without the query.
    path: &'a str,
    /// The pool that the request was routed to.
    pool: &'a str,
    /// The status of the response. 499 if the client disconnected before it was sent.
    status: u16,
    /// How the request ended: `ok`, `picker_reply`, `max_forwards`, `cors_preflight`, `models`, or a reason of errors.md.
    reason: &'a str,
    /// The EPP's own reason, if it replied to the client or evicted the request: `x-llm-d-request-dropped-reason` of
    /// its reply.
    reason_detail: &'a str,
    /// The endpoint that responded, as `ip:port`. Empty if none did.
    endpoint: &'a str,
    /// The path that carried the response body: `local`, `ingress`, `wire`, `relay`, or `none` without a response of an
    /// endpoint.
    carried_by: &'a str,
    /// The steer reason of steering.md, or `none`.
    carried_why: &'a str,
    /// Bytes from the endpoint that the kernel carried.
    bytes_kernel: u64,
    /// Bytes from the endpoint that user space carried.
    bytes_user: u64,
    /// Bytes that the client sent after an upgrade, or on a pinned connection. Only if there were any, or the
    /// connection is pinned.
    bytes_up: u64,
    /// How many of `bytes_up` the kernel carried.
    bytes_up_kernel: u64,
    /// Time from asking the EPP to its decision, in microseconds. 0 without a decision of an EPP.
    pick_us: u64,
    /// Time from the first byte of the request to the first byte of the response body, in microseconds. 0 without one.
    ttft_us: u64,
    /// Time from the first byte of the request to the last byte of the response, in microseconds; for a pinned
    /// connection, how long it was pinned.
    took_us: u64,
    /// The dynamic metadata of the EPP's replies except the pick: a JSON object with an object for each namespace.
    metadata: &'a str,
    /// The error that the agent answered with, or that the client disconnected.
    error: &'a str,
}

/// The line of a request that was routed to `pool`. All of its fields are named, so that none is forgotten. `took`: from the first byte
/// of the request to the last one of the response. `metadata`: what an EPP replied. `error`: the text of the agent's own answer.
pub(super) fn routed(
    record: &Record,
    parts: &request::Parts,
    pool: &str,
    took: Duration,
    metadata: Option<&Collected>,
    error: Option<&str>,
) {
    let request_id = parts.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
    let account = &record.account;
    let up = account.upstream > 0;
    Line {
        pinned: None,
        adopted: None,
        client: Some(display(record.client)),
        client_certificate: record.identity.as_ref().map(|identity| identity.name.as_str()),
        request_id: Some(&cut(request_id, text::NAME)),
        method: Some(display(&cut(parts.method.as_str(), text::NAME))),
        path: Some(&cut(parts.uri.path(), text::PHRASE)),
        pool: Some(pool),
        status: Some(record.status.as_u16()),
        reason: Some(record.reason),
        reason_detail: record.detail.as_deref(),
        endpoint: Some(&record.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default()),
        carried_by: Some(record.path),
        carried_why: Some(record.path_reason),
        bytes_kernel: Some(account.steered + account.local + account.wire),
        bytes_user: Some(account.relayed),
        bytes_up: up.then_some(account.upstream),
        bytes_up_kernel: up.then_some(account.upstream_steered),
        pick_us: Some(record.picked_in.as_micros() as u64),
        ttft_us: Some(record.first_byte().as_micros() as u64),
        took_us: Some(took.as_micros() as u64),
        metadata: metadata.and_then(Collected::json).as_deref(),
        error,
    }
    .write();
}

/// The line of a request that was not routed to a pool. `error`: the text of the agent's own answer, if that was an error.
pub(super) fn unrouted(client: SocketAddr, status: StatusCode, reason: &str, error: Option<&str>, took: Duration) {
    Line {
        client: Some(display(client)),
        status: Some(status.as_u16()),
        reason: Some(reason),
        took_us: Some(took.as_micros() as u64),
        error,
        ..Line::default()
    }
    .write();
}

/// The line of a pinned connection, whose bytes from the endpoint took `path`. `reason`: how it ended.
pub(super) fn pinned(
    client: SocketAddr,
    pool: &str,
    endpoint: SocketAddr,
    path: Path,
    reason: &str,
    account: &Account,
    took: Duration,
) {
    Line {
        pinned: Some(true),
        client: Some(display(client)),
        pool: Some(pool),
        endpoint: Some(&endpoint.to_string()),
        reason: Some(reason),
        carried_by: Some(path.label()),
        bytes_kernel: Some(account.steered + account.local),
        bytes_user: Some(account.relayed),
        bytes_up: Some(account.upstream),
        bytes_up_kernel: Some(account.upstream_steered),
        took_us: Some(took.as_micros() as u64),
        ..Line::default()
    }
    .write();
}

/// The line of a flow that another agent began. `reason`: how it ended.
pub(super) fn adopted(flow: &AdoptedFlow, seen: &Seen, story: &Story, reason: &str) {
    Line {
        adopted: Some(true),
        client: Some(display(flow.client)),
        status: Some(story.status),
        reason: Some(reason),
        endpoint: Some(&flow.endpoint.to_string()),
        carried_by: Some(Path::Wire.label()),
        bytes_kernel: Some(seen.bytes),
        bytes_user: Some(story.relayed),
        took_us: Some(seen.last_ns.saturating_sub(story.started_ns) / 1000),
        ..Line::default()
    }
    .write();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field has a row with its documentation, in the order of the line, and every row has a field.
    #[test]
    fn every_field_is_documented() {
        let text = include_str!("../../../docs/access-log.md");
        let rows: Vec<_> = text.lines().filter(|line| line.starts_with("| `")).collect();
        let fields = FIELDS.iter().map(|(name, doc)| format!("| `{name}` | {} |", doc.trim()));
        assert_eq!(rows, fields.collect::<Vec<_>>());
    }
}
