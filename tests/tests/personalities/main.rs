//! Every kind of request through an agent with an EPP, against each known picker: the same scenarios and expectations, whatever
//! the picker's message pattern. Also what a picker is told about responses.

mod counted;
mod requests;
mod responses;
mod told;

use std::time::Duration;

use penstock_tests::scripted_epp::{Dynamo, Gie, LlmdRouter, Lwepp};

/// Upper bound for events expected soon, with room for a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Runs each scenario against each picker, so that a failure names both.
macro_rules! against_every_picker {
    ($($module:ident::$scenario:ident)+) => {
        mod gie { $(#[tokio::test] async fn $scenario() { super::$module::$scenario::<super::Gie>().await; })+ }
        mod llmd { $(#[tokio::test] async fn $scenario() { super::$module::$scenario::<super::LlmdRouter>().await; })+ }
        mod lwepp { $(#[tokio::test] async fn $scenario() { super::$module::$scenario::<super::Lwepp>().await; })+ }
        mod dynamo { $(#[tokio::test] async fn $scenario() { super::$module::$scenario::<super::Dynamo>().await; })+ }
    };
}

against_every_picker! {
    requests::request_without_body_is_picked
    requests::small_chat_request_is_served
    requests::bodies_of_300_kb_and_3_mb_arrive_whole
    requests::slow_chunked_upload_arrives_with_length
    requests::rewritten_model_reaches_endpoint
    requests::fields_are_changed_both_ways
    requests::disaggregation_fields_reach_endpoint
    requests::picker_trace_context_reaches_endpoint
    requests::each_request_of_a_connection_is_picked
    requests::dead_first_choice_is_followed_by_second
    requests::picker_without_endpoints_answers_or_failure_mode_decides
    requests::health_service_name_decides_health
    responses::relayed_stream_is_reported_to_picker
    responses::steered_stream_is_reported_to_picker
    responses::picker_death_cuts_no_response
    responses::client_disconnect_ends_picker_stream
}
