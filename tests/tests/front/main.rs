//! What clients and endpoints may speak: HTTP/1.1 and HTTP/2, clients with TLS and without. Whoever speaks what, the bytes are
//! the same; and what each of them has of its own: streams, gRPC's manners, certificates, upgrades.

mod exchanges;
mod far_clients;
mod grpc;
mod half_close;
mod http2_clients;
mod http2_endpoints;
mod http2_limits;
mod scene;
mod slow_readers;
mod smuggling;
mod tls;
mod upgrades;

use std::time::Duration;

/// Longest wait for what is to happen soon; a bound for a machine that is busy, not an expectation.
const SOON: Duration = Duration::from_secs(30);

/// Each exchange between each pair, so that a failure names all three.
macro_rules! between_every_pair {
    ($($exchange:ident)+) => {
        between_every_pair!(@pair http2_to_http1, Http2, Http1: $($exchange)+);
        between_every_pair!(@pair http1_to_http2, Http1, Http2: $($exchange)+);
        between_every_pair!(@pair http2_to_http2, Http2, Http2: $($exchange)+);
        between_every_pair!(@pair tls_to_http1, Tls1, Http1: $($exchange)+);
        between_every_pair!(@pair http2_in_tls_to_http1, Tls2, Http1: $($exchange)+);
        between_every_pair!(@pair http2_in_tls_to_http2, Tls2, Http2: $($exchange)+);
    };
    (@pair $pair:ident, $front:ident, $back:ident: $($exchange:ident)+) => {
        mod $pair {
            use crate::{exchanges, scene::{Back, Front}};
            $(#[tokio::test] async fn $exchange() { exchanges::$exchange(Front::$front, Back::$back).await; })+
        }
    };
}

between_every_pair! {
    without_a_body
    json_through_a_picker
    twenty_mebibytes_each_way
    uploads_in_pieces
    events_arrive_as_they_are_sent
    the_head_does_not_wait_for_the_body
    lengths_and_trailers
    heads_without_a_body
    a_body_without_a_length
    what_the_endpoint_breaks_off_never_ends_cleanly
    a_client_that_leaves_ends_it_all
    a_client_that_reads_nothing
    errors_are_told_as_openai_does
    the_picker_answers
    the_picker_evicts
    fields_are_fit_to_travel
    the_idle_time_of_a_response
}
