//! Our messages against a binding of Envoy's own files: what one writes the other reads, field by field.

use std::fmt::Debug;

use envoy_types::pb::{
    envoy::{
        config::core::v3 as their_core, extensions::filters::http::ext_proc::v3::ProcessingMode,
        service::ext_proc::v3 as theirs, r#type::v3::HttpStatus,
    },
    google::protobuf as well_known,
};
use penstock_proto::{core, ext_proc, http_type};
use prost::Message;

/// Both stand for the same message: each decodes from the bytes of the other.
#[track_caller]
fn same<Ours, Theirs>(ours: &Ours, theirs: &Theirs)
where
    Ours: Message + Default + PartialEq + Debug,
    Theirs: Message + Default + PartialEq + Debug,
{
    assert_eq!(&Ours::decode(theirs.encode_to_vec().as_slice()).expect("theirs is read by ours"), ours);
    assert_eq!(&Theirs::decode(ours.encode_to_vec().as_slice()).expect("ours is read by theirs"), theirs);
}

fn our_headers() -> core::HeaderMap {
    let text = core::HeaderValue { key: ":path".into(), value: "/v1".into(), raw_value: b"/v1"[..].into() };
    core::HeaderMap { headers: vec![text] }
}

fn their_headers() -> their_core::HeaderMap {
    let text = their_core::HeaderValue { key: ":path".into(), value: "/v1".into(), raw_value: b"/v1".to_vec() };
    their_core::HeaderMap { headers: vec![text] }
}

fn our_struct() -> prost_types::Struct {
    use prost_types::{ListValue, Value, value::Kind};
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.into())) };
    let list = Value { kind: Some(Kind::ListValue(ListValue { values: vec![text("10.0.0.1:8000")] })) };
    prost_types::Struct { fields: [("list".to_owned(), list), ("text".to_owned(), text("[::1]:80"))].into() }
}

fn their_struct() -> well_known::Struct {
    use well_known::{ListValue, Value, value::Kind};
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.into())) };
    let list = Value { kind: Some(Kind::ListValue(ListValue { values: vec![text("10.0.0.1:8000")] })) };
    well_known::Struct { fields: [("list".to_owned(), list), ("text".to_owned(), text("[::1]:80"))].into() }
}

fn our_mutation() -> ext_proc::HeaderMutation {
    let header = our_headers().headers.pop();
    let option = |append, append_action| core::HeaderValueOption { header: header.clone(), append, append_action };
    let set_headers = vec![option(None, 0), option(Some(false), 1), option(Some(true), 2), option(None, 3)];
    ext_proc::HeaderMutation { set_headers, remove_headers: vec!["x-token".into()] }
}

fn their_mutation() -> theirs::HeaderMutation {
    let header = their_headers().headers.pop();
    #[allow(deprecated)]
    let option = |append: Option<bool>, append_action| their_core::HeaderValueOption {
        header: header.clone(),
        append: append.map(|value| well_known::BoolValue { value }),
        append_action,
        keep_empty_value: false,
    };
    let set_headers = vec![option(None, 0), option(Some(false), 1), option(Some(true), 2), option(None, 3)];
    theirs::HeaderMutation { set_headers, remove_headers: vec!["x-token".into()] }
}

#[test]
fn requests() {
    use ext_proc::{HttpBody, HttpHeaders, HttpTrailers, processing_request::Request as Ours};
    use theirs::processing_request::Request as Theirs;
    let head = |end_of_stream| HttpHeaders { headers: Some(our_headers()), end_of_stream };
    let their_head =
        |end_of_stream| theirs::HttpHeaders { headers: Some(their_headers()), end_of_stream, ..Default::default() };
    let body = |end_of_stream| HttpBody { body: b"piece"[..].into(), end_of_stream };
    let their_body = |end_of_stream| theirs::HttpBody { body: b"piece".to_vec(), end_of_stream, ..Default::default() };
    let trailers = || HttpTrailers { trailers: Some(our_headers()) };
    let their_trailers = || theirs::HttpTrailers { trailers: Some(their_headers()) };
    let rows = [
        (Ours::RequestHeaders(head(true)), Theirs::RequestHeaders(their_head(true))),
        (Ours::ResponseHeaders(head(false)), Theirs::ResponseHeaders(their_head(false))),
        (Ours::RequestBody(body(false)), Theirs::RequestBody(their_body(false))),
        (Ours::ResponseBody(body(true)), Theirs::ResponseBody(their_body(true))),
        (Ours::RequestTrailers(trailers()), Theirs::RequestTrailers(their_trailers())),
        (Ours::ResponseTrailers(trailers()), Theirs::ResponseTrailers(their_trailers())),
    ];
    for (ours, theirs_request) in rows {
        let metadata = core::Metadata { filter_metadata: [("envoy.lb".to_owned(), our_struct())].into() };
        let their_metadata = their_core::Metadata {
            filter_metadata: [("envoy.lb".to_owned(), their_struct())].into(),
            ..Default::default()
        };
        same(
            &ext_proc::ProcessingRequest {
                request: Some(ours),
                metadata_context: Some(metadata),
                protocol_config: Some(ext_proc::ProtocolConfiguration {
                    request_body_mode: ext_proc::BodySendMode::FullDuplexStreamed.into(),
                    response_body_mode: ext_proc::BodySendMode::BufferedPartial.into(),
                    send_body_without_waiting_for_header_response: true,
                }),
            },
            &theirs::ProcessingRequest {
                request: Some(theirs_request),
                metadata_context: Some(their_metadata),
                protocol_config: Some(theirs::ProtocolConfiguration {
                    request_body_mode: 4,
                    response_body_mode: 3,
                    send_body_without_waiting_for_header_response: true,
                }),
                ..Default::default()
            },
        );
    }
}

/// A response of each kind, ours and theirs, with this mutation of the body.
fn replies(
    mutation: &ext_proc::body_mutation::Mutation,
    their_body_mutation: &theirs::body_mutation::Mutation,
) -> [(ext_proc::processing_response::Response, theirs::processing_response::Response); 7] {
    use ext_proc::{
        BodyResponse, CommonResponse, HeadersResponse, TrailersResponse, processing_response::Response as Ours,
    };
    use theirs::processing_response::Response as Theirs;
    let common = || CommonResponse {
        status: ext_proc::common_response::ResponseStatus::ContinueAndReplace.into(),
        header_mutation: Some(our_mutation()),
        body_mutation: Some(ext_proc::BodyMutation { mutation: Some(mutation.clone()) }),
        clear_route_cache: true,
    };
    let their_common = || theirs::CommonResponse {
        status: 1,
        header_mutation: Some(their_mutation()),
        body_mutation: Some(theirs::BodyMutation { mutation: Some(their_body_mutation.clone()) }),
        clear_route_cache: true,
        ..Default::default()
    };
    let head = || HeadersResponse { response: Some(common()) };
    let their_head = || theirs::HeadersResponse { response: Some(their_common()) };
    let body = || BodyResponse { response: Some(common()) };
    let their_body = || theirs::BodyResponse { response: Some(their_common()) };
    let trailers = || TrailersResponse { header_mutation: Some(our_mutation()) };
    let their_trailers = || theirs::TrailersResponse { header_mutation: Some(their_mutation()) };
    let immediate = ext_proc::ImmediateResponse {
        status: Some(http_type::HttpStatus { code: 429 }),
        headers: Some(our_mutation()),
        body: b"busy"[..].into(),
        grpc_status: Some(ext_proc::GrpcStatus { status: 8 }),
        details: "shed".into(),
    };
    let their_immediate = theirs::ImmediateResponse {
        status: Some(HttpStatus { code: 429 }),
        headers: Some(their_mutation()),
        body: b"busy".to_vec(),
        grpc_status: Some(theirs::GrpcStatus { status: 8 }),
        details: "shed".into(),
    };
    [
        (Ours::RequestHeaders(head()), Theirs::RequestHeaders(their_head())),
        (Ours::ResponseHeaders(head()), Theirs::ResponseHeaders(their_head())),
        (Ours::RequestBody(body()), Theirs::RequestBody(their_body())),
        (Ours::ResponseBody(body()), Theirs::ResponseBody(their_body())),
        (Ours::RequestTrailers(trailers()), Theirs::RequestTrailers(their_trailers())),
        (Ours::ResponseTrailers(trailers()), Theirs::ResponseTrailers(their_trailers())),
        (Ours::ImmediateResponse(immediate), Theirs::ImmediateResponse(their_immediate)),
    ]
}

#[test]
#[allow(deprecated)]
fn responses() {
    use ext_proc::body_mutation::Mutation;
    use theirs::body_mutation::Mutation as TheirMutation;
    let mutations = [
        (Mutation::Body(b"all"[..].into()), TheirMutation::Body(b"all".to_vec())),
        (Mutation::ClearBody(true), TheirMutation::ClearBody(true)),
        (
            Mutation::StreamedResponse(ext_proc::StreamedBodyResponse {
                body: b"some"[..].into(),
                end_of_stream: true,
            }),
            TheirMutation::StreamedResponse(theirs::StreamedBodyResponse {
                body: b"some".to_vec(),
                end_of_stream: true,
                ..Default::default()
            }),
        ),
    ];
    for (mutation, their_body_mutation) in mutations {
        let rows = replies(&mutation, &their_body_mutation);
        for (ours, their_response) in rows {
            same(
                &ext_proc::ProcessingResponse {
                    response: Some(ours),
                    dynamic_metadata: Some(our_struct()),
                    override_message_timeout: Some(prost_types::Duration { seconds: 3, nanos: 5 }),
                    mode_override: Some(ext_proc::ProcessingMode {}),
                    request_drain: true,
                    request_drain_requests: true,
                    request_drain_responses: true,
                },
                &theirs::ProcessingResponse {
                    response: Some(their_response),
                    dynamic_metadata: Some(their_struct()),
                    override_message_timeout: Some(well_known::Duration { seconds: 3, nanos: 5 }),
                    mode_override: Some(Default::default()),
                    request_drain: true,
                    request_drain_requests: true,
                    request_drain_responses: true,
                    ..Default::default()
                },
            );
        }
    }
}

#[test]
fn what_we_leave_out_is_skipped() {
    let mode = ProcessingMode { request_header_mode: 1, response_body_mode: 4, ..Default::default() };
    let bytes = theirs::ProcessingResponse {
        mode_override: Some(mode),
        dynamic_metadata: Some(their_struct()),
        ..Default::default()
    }
    .encode_to_vec();
    let ours = ext_proc::ProcessingResponse::decode(bytes.as_slice()).expect("unknown fields are no error");
    let expected = ext_proc::ProcessingResponse {
        mode_override: Some(ext_proc::ProcessingMode {}),
        dynamic_metadata: Some(our_struct()),
        ..Default::default()
    };
    assert_eq!(ours, expected);
}

/// A binding of the health protocol is not at hand; its two messages have one field each.
#[test]
fn health() {
    use penstock_proto::health::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};
    assert_eq!(HealthCheckRequest { service: "readiness".into() }.encode_to_vec(), b"\x0a\x09readiness");
    assert_eq!(HealthCheckResponse { status: ServingStatus::NotServing.into() }.encode_to_vec(), b"\x08\x02");
}
