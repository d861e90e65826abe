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
    requests::without_a_body
    requests::small_chat
    requests::bodies_of_300_kb_and_3_mb
    requests::an_upload_in_slow_chunks
    requests::the_model_is_rewritten
    requests::fields_are_changed_both_ways
    requests::fields_for_disaggregation
    requests::the_pickers_trace
    requests::each_of_a_connection_has_its_own_pick
    requests::the_first_of_the_list_is_dead
    requests::nothing_to_pick
    requests::its_health
    responses::a_stream_through_user_space
    responses::a_stream_through_the_kernel
    responses::the_picker_dies
    responses::the_client_leaves
}
