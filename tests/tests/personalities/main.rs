//! Every kind of request through an agent that asks a picker, against each picker there is in the field: the same scenario,
//! the same expectations, whatever the picker's manners. And what a picker can be told of responses.

mod requests;
mod responses;
mod told;

use std::time::Duration;

use penstock_tests::scripted_epp::{Dynamo, Gie, LlmdRouter, Lwepp};

/// Longest wait for what is to happen soon; a bound for a machine that is busy, not an expectation.
const SOON: Duration = Duration::from_secs(30);

/// Each scenario against each picker, so that a failure names both.
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
