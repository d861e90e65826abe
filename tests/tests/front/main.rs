//! Clients and endpoints over HTTP/1.1 and HTTP/2, with and without TLS. The bytes are the same for every protocol pair; each
//! protocol's own features (streams, gRPC, certificates, upgrades) have their own tests.

mod age;
mod client_certificates;
mod cors;
mod evictions;
mod exchanges;
mod far_clients;
mod fields;
mod grpc;
mod half_close;
mod http10;
mod held_heads;
mod https_endpoints;
mod http2_bursts;
mod http2_clients;
mod http2_endpoints;
mod http2_limits;
mod picker_trailers;
mod model_list;
mod proxy_protocol;
mod replaced;
mod scene;
mod sse_keepalive;
mod returned;
mod slow_endpoints;
mod slow_readers;
mod smuggling;
mod tls;
mod unix_epp;
mod upgrades;

use std::time::Duration;

/// Upper bound for events expected soon, with room for a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Runs each exchange for each protocol pair, so that a failure names all three.
macro_rules! between_every_pair {
    ($($exchange:ident)+) => {
        between_every_pair!(@pair http2_to_http1, Http2, Http1: $($exchange)+);
        between_every_pair!(@pair http1_to_http2, Http1, Http2: $($exchange)+);
        between_every_pair!(@pair http2_to_http2, Http2, Http2: $($exchange)+);
        between_every_pair!(@pair http1_to_https, Http1, Https: $($exchange)+);
        between_every_pair!(@pair http2_to_https, Http2, Https: $($exchange)+);
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
    request_without_body_is_served
    json_changed_by_picker_reaches_endpoint
    model_is_changed_in_body_that_picker_got_abridged
    twenty_mebibytes_pass_each_way
    upload_in_pieces_arrives_with_length
    events_arrive_as_they_are_sent
    response_head_does_not_wait_for_body
    lengths_and_trailers_are_kept
    bodiless_heads_keep_their_length
    body_without_length_is_delivered
    endpoint_break_never_ends_cleanly
    client_disconnect_ends_request_everywhere
    unread_response_is_bounded
    errors_have_openai_shape
    immediate_reply_reaches_client
    eviction_ends_request
    fields_are_translated_between_protocols
    idle_timeout_breaks_response
}
