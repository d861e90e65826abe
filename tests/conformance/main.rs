//! The data plane's part of the Gateway API Inference Extension's conformance suite: each test has its name there (in snake
//! case) and is rewritten from what it checks, against the suite's light picker. [`epp_core`] adds what the suite omits. Every
//! test runs relayed and steered. `docs/conformance.md` has the table.

mod cluster;
mod routing;
mod failing;
mod rules;
mod epp_core;

use std::time::Duration;

use penstock_agent::config::SteeringMode;

/// Upper bound for events expected soon, with room for a busy machine.
const SOON: Duration = Duration::from_secs(30);

macro_rules! on_both_paths {
    ($($module:ident::$name:ident)+) => {
        mod relayed { $(#[tokio::test] async fn $name() { super::$module::$name(super::SteeringMode::Off).await; })+ }
        mod steered { $(#[tokio::test] async fn $name() { super::$module::$name(super::SteeringMode::Auto).await; })+ }
    };
}

on_both_paths! {
    routing::gateway_following_epp_routing
    routing::gateway_following_epp_routing_with_data_parallelism
    routing::gateway_destination_endpoint_served
    routing::inference_pool_app_protocol
    failing::epp_unavailable_fail_open
    failing::epp_unavailable_fail_closed
    failing::inference_pool_invalid_epp_service
    rules::gateway_weighted_across_two_inference_pools
    rules::http_route_multiple_gateways_different_pools
    rules::inference_pool_http_route_multiple_rules
    rules::inference_pool_http_route_port_validation
    rules::inference_pool_resolved_refs_condition
    epp_core::events_arrive_as_they_are_sent
}
