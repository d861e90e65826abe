//! The access log: one line for each request, and one for each pinned connection, with the target `penstock::access`.
//!
//! `fields!` declares each field once, with its documentation. `cargo xtask settings` writes docs/access-log.md from
//! it.

use std::net::SocketAddr;

use tracing::field::DisplayValue;

/// Declares the fields in the order in which they are written. A field that is `None` is not written.
macro_rules! fields {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty,)+) => {
        /// The fields of one line.
        #[derive(Default)]
        pub(super) struct Line<'a> {
            $($(#[doc = $doc])+ pub(super) $name: Option<$type>,)+
        }

        impl Line<'_> {
            pub(super) fn write(&self) {
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
    /// How the request ended: `ok`, `picker_reply`, `max_forwards`, or a reason of errors.md.
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
