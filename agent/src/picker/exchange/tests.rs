//! Tests of the exchange: tables of steps on a stream and the events that follow.

use http::HeaderMap;
use penstock_proto::{
    core::{HeaderValue, HeaderValueOption},
    ext_proc::{
        BodyMutation, HeadersResponse, HttpBody, HttpHeaders, StreamedBodyResponse, TrailersResponse,
        body_mutation::Mutation,
    },
    http_type::HttpStatus,
};
use prost_types::{ListValue, Struct, Value, value::Kind};

use super::*;
use crate::{budget::Budget, picker::message};

mod steps;
use steps::*;

/// Each row: the steps, the events, and the step after which the last event occurs.
#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn replies_in_any_order_lead_to_one_outcome() {
    #[rustfmt::skip]
    let rows: Vec<(&str, Vec<Step>, &[&str], usize)> = vec![
        // Replies of known EPPs.
        ("GIE: silent until the end, head, then the body streamed", vec![Piece, End, head(A), streamed("new", false), streamed("er", true)], &["10.0.0.1:1 replaced newer"], 5),
        ("lwepp: an empty reply per piece, then the head", vec![Piece, kept(), Piece, kept(), End, kept(), head(A)], &["10.0.0.1:1 original"], 7),
        ("lwepp, all replies after the end", vec![Piece, Piece, End, kept(), kept(), kept(), head(A)], &["10.0.0.1:1 original"], 7),
        ("empty replies after the head", vec![Piece, End, head(A), kept(), kept()], &["10.0.0.1:1 original"], 5),
        ("empty replies, then streamed", vec![Piece, kept(), End, streamed("new", true), head(A)], &["10.0.0.1:1 replaced new"], 5),
        ("llm-d: closes after the request phase", vec![Piece, End, head(A), streamed("new", true), Closed], &["10.0.0.1:1 replaced new"], 4),
        // Other orders.
        ("head before the end of the body", vec![Piece, head(A), streamed("n", false), End, streamed("ew", true)], &["10.0.0.1:1 replaced new"], 5),
        ("all replies before the end", vec![Piece, kept(), head(A), End, kept()], &["10.0.0.1:1 original"], 5),
        ("body before head", vec![Piece, End, streamed("new", true), head(A)], &["10.0.0.1:1 replaced new"], 4),
        ("two ends", vec![End, streamed("new", true), streamed("", true), head(A), streamed("x", true)], &["10.0.0.1:1 replaced new"], 4),
        ("two ends of the request", vec![End, End, head(A), kept()], &["10.0.0.1:1 original"], 4),
        ("an empty replacement", vec![End, head(A), streamed("", true)], &["10.0.0.1:1 replaced "], 3),
        ("trailers are ignored", vec![End, trailers(), head(A), trailers(), kept()], &["10.0.0.1:1 original"], 5),
        // Other ways to replace.
        ("whole bodies, one per piece", vec![Piece, body(Mutation::Body("ab".into())), End, body(Mutation::Body("cd".into())), head(A)], &["10.0.0.1:1 replaced abcd"], 5),
        ("dropped, then whole", vec![Piece, body(Mutation::ClearBody(true)), End, body(Mutation::Body("cd".into())), head(A)], &["10.0.0.1:1 replaced cd"], 5),
        ("cleared", vec![End, head(A), body(Mutation::ClearBody(true))], &["10.0.0.1:1 replaced "], 3),
        ("not cleared", vec![End, head(A), body(Mutation::ClearBody(false))], &["10.0.0.1:1 original"], 3),
        ("one piece kept and one replaced", vec![Piece, kept(), End, body(Mutation::Body("cd".into())), head(A)], &["error body_partial"], 5),
        ("replaced per piece and streamed", vec![Piece, body(Mutation::Body("ab".into())), End, streamed("cd", true), head(A)], &["error body_partial"], 5),
        ("with the head", vec![Piece, replace_at_head(A, "whole")], &["10.0.0.1:1 replaced whole"], 2),
        ("exactly the limit", vec![End, head(A), streamed("12345", false), streamed("67890", true)], &["10.0.0.1:1 replaced 1234567890"], 4),
        ("too large", vec![End, head(A), streamed("12345", false), streamed("678901", false), streamed("", true)], &["error body_too_large"], 4),
        // Location of the pick.
        ("metadata before header", vec![End, with_metadata(head("10.0.0.2:2"), text(A)), kept()], &["10.0.0.1:1 original"], 3),
        ("metadata alone", vec![End, with_metadata(no_pick(), text(A)), kept()], &["10.0.0.1:1 original"], 3),
        ("metadata with the body reply", vec![End, with_metadata(kept(), text(A)), no_pick()], &["10.0.0.1:1 original"], 3),
        ("metadata as a list", vec![End, with_metadata(no_pick(), Kind::ListValue(ListValue { values: vec![Value { kind: Some(text(A)) }, Value { kind: Some(text("[::1]:2")) }] })), kept()], &["10.0.0.1:1,[::1]:2 original"], 3),
        ("empty metadata", vec![End, with_metadata(head(A), text(" ")), kept()], &["10.0.0.1:1 original"], 3),
        ("metadata that is not text", vec![End, with_metadata(head(A), Kind::BoolValue(true)), kept()], &["10.0.0.1:1 original"], 3),
        ("a list", vec![End, head(" 10.0.0.1:1, [fd00::2]:8000 ,10.0.0.1:1,,10.0.0.3:3"), kept()], &["10.0.0.1:1,[fd00::2]:8000,10.0.0.3:3 original"], 3),
        ("a name in the list", vec![End, head("10.0.0.1:1,pod-7:8000"), kept()], &["10.0.0.1:1 original"], 3),
        ("only commas", vec![End, head(" , "), kept()], &["error no_destination"], 3),
        ("no pick", vec![End, no_pick(), kept()], &["error no_destination"], 3),
        // Immediate responses.
        ("at once", vec![immediate(429)], &["immediate 429"], 1),
        ("while uploading", vec![Piece, immediate(503), Piece, End], &["immediate 503"], 2),
        ("after the head", vec![End, head(A), immediate(429), kept()], &["immediate 429"], 3),
        ("then closed", vec![End, immediate(429), Closed], &["immediate 429"], 2),
        ("eviction", vec![End, head(A), kept(), immediate(429)], &["10.0.0.1:1 original", "immediate 429"], 4),
        ("without a status", vec![immediate(0)], &["immediate 500"], 1),
        ("with an interim status", vec![immediate(103)], &["immediate 500"], 1),
        // Replies of an unknown kind.
        ("of an unknown kind", vec![Piece, unknown(), End, head(A)], &["error unknown_reply"], 2),
        ("of an unknown kind after the decision", vec![End, head(A), kept(), unknown()], &["10.0.0.1:1 original"], 3),
        ("empty", vec![End, Reply(Box::default()), head(A), kept()], &["error unknown_reply"], 2),
        ("metadata before the head reply", vec![with_metadata(Reply(Box::default()), text(A)), End, no_pick(), kept()], &["10.0.0.1:1 original"], 4),
        ("metadata after the head reply", vec![End, no_pick(), with_metadata(Reply(Box::default()), text(A)), kept()], &["10.0.0.1:1 original"], 4),
        // Clean close.
        ("before anything", vec![Piece, Closed], &["error closed_without_pick"], 2),
        ("after empty replies", vec![End, kept(), Closed], &["error closed_without_pick"], 3),
        ("after a head without a pick", vec![End, no_pick(), Closed], &["error closed_without_pick"], 3),
        ("after the head", vec![End, head(A), Closed], &["10.0.0.1:1 original"], 3),
        ("after the head, while uploading", vec![Piece, head(A), Closed, Piece, End], &["10.0.0.1:1 original"], 3),
        ("within the replacement", vec![End, head(A), streamed("n", false), Closed], &["error body_partial"], 4),
        ("after the decision", vec![End, head(A), kept(), Closed, Closed], &["10.0.0.1:1 original"], 3),
        // Error close.
        ("lost before anything", vec![Piece, Failed], &["error reset"], 2),
        ("lost after the head", vec![End, head(A), Failed], &["error reset"], 3),
        ("lost after the decision", vec![End, head(A), kept(), Failed], &["10.0.0.1:1 original"], 3),
        // Deadline.
        ("nothing came", vec![Piece, End, Deadline], &["error deadline"], 3),
        ("replies without the head", vec![End, kept(), Deadline], &["error deadline"], 3),
        ("the head alone", vec![Piece, End, head(A), Deadline], &["10.0.0.1:1 original"], 4),
        ("the head and some empty replies", vec![Piece, End, head(A), kept(), Deadline], &["10.0.0.1:1 original"], 5),
        ("the head alone, still uploading", vec![Piece, head(A), Deadline], &["error deadline"], 3),
        ("a head without a pick", vec![End, no_pick(), Deadline], &["error deadline"], 3),
        ("within the replacement", vec![End, head(A), streamed("n", false), Deadline], &["error body_partial"], 4),
        ("deadline after the decision", vec![End, head(A), kept(), Deadline], &["10.0.0.1:1 original"], 3),
    ];
    for (name, steps, expected, at) in rows {
        assert_eq!(
            run(&mut exchange(true, None), steps),
            (expected.iter().map(|s| (*s).to_owned()).collect(), at),
            "{name}"
        );
    }
}

#[test]
fn message_without_a_reply_changes_nothing() {
    for notice in notices() {
        for steps in [
            vec![notice.clone(), End, head(A), kept()],
            vec![End, notice.clone(), head(A), notice.clone(), kept()],
            vec![End, head(A), kept(), notice.clone()],
        ] {
            let mut exchange = exchange(true, None);
            assert_eq!(run(&mut exchange, steps).0, ["10.0.0.1:1 original"], "{notice:?}");
        }
        let mut exchange = exchange(true, None);
        assert_eq!(run(&mut exchange, vec![End, notice.clone(), Deadline]).0, ["error deadline"], "{notice:?}");
        assert!(!exchange.answered(), "{notice:?}");
    }
}

/// CONTINUE_AND_REPLACE: no reply to the body follows, whether or not it is replaced.
#[test]
fn last_reply_at_the_head_replaces_the_body_only_with_a_body() {
    for mutation in unchanged() {
        let last = || last_at_head(A, mutation.clone());
        for (steps, expected, at) in [
            (vec![last()], "10.0.0.1:1 original", 1),
            (vec![Piece, kept(), End, last()], "10.0.0.1:1 original", 4),
            (vec![Piece, last(), streamed("late", true), End], "10.0.0.1:1 original", 2),
            // Earlier replies have replaced a part, or all.
            (vec![End, streamed("new", false), last(), streamed("er", true)], "10.0.0.1:1 replaced newer", 4),
            (vec![End, streamed("new", true), last()], "10.0.0.1:1 replaced new", 3),
            (vec![End, body(Mutation::Body("ab".into())), last()], "10.0.0.1:1 replaced ab", 3),
            (vec![Piece, body(Mutation::Body("ab".into())), last(), End, Closed], "error body_partial", 5),
        ] {
            let shown = format!("{steps:?}");
            assert_eq!(run(&mut exchange(true, None), steps), (vec![expected.to_owned()], at), "{shown}");
        }
        assert_eq!(run(&mut exchange(false, None), vec![last()]).0, ["10.0.0.1:1 original"]);
    }
    for (mutation, rest, expected) in [
        (Mutation::Body("all".into()), vec![], "10.0.0.1:1 replaced all"),
        (Mutation::ClearBody(true), vec![], "10.0.0.1:1 replaced "),
        (piece("all", true), vec![], "10.0.0.1:1 replaced all"),
        (piece("al", false), vec![streamed("l", true)], "10.0.0.1:1 replaced all"),
    ] {
        let shown = format!("{mutation:?}");
        let steps = [vec![Piece, last_at_head(A, mutated(mutation.clone()))], rest].concat();
        assert_eq!(run(&mut exchange(true, None), steps).0, [expected], "{shown}");
        if mutation != piece("al", false) {
            let steps = vec![End, streamed("new", false), last_at_head(A, mutated(mutation))];
            assert_eq!(run(&mut exchange(true, None), steps).0, ["error body_partial"], "{shown} after a piece");
        }
    }
}

/// An exchange whose answers are obeyed, after a decision and the head of a response.
fn responding() -> Exchange {
    let mut exchange = exchange(false, None);
    run(&mut exchange, vec![head(A)]);
    exchange.obey();
    exchange.response_headers(http::StatusCode::OK, &HeaderMap::new(), A.parse().unwrap(), false);
    while exchange.next_message().is_some() {}
    exchange
}

#[test]
fn last_reply_at_the_response_head_replaces_or_declines_the_body() {
    let whole = |text: &'static str| format!("{:?}", Answer::Whole(text.into()));
    let mut rows = unchanged().map(|mutation| (mutation, "declined".to_owned())).to_vec();
    rows.extend([
        (mutated(Mutation::Body("all".into())), whole("all")),
        (mutated(Mutation::ClearBody(true)), whole("")),
        (mutated(piece("all", true)), whole("all")),
        (mutated(piece("al", false)), format!("{:?}", Answer::Streamed("al".into(), false))),
    ]);
    for (mutation, expected) in rows {
        let mut exchange = responding();
        let found = run(&mut exchange, vec![last_at_response(&[("x-a", "1")], mutation.clone())]).0;
        assert_eq!(found, ["response head 1", expected.as_str()]);
        assert_eq!(
            (exchange.declines_body(), exchange.replaces_body()),
            (expected == "declined", expected != "declined")
        );
        exchange.response_body("more".into(), true);
        assert!(!exchange.has_message(), "nothing more is sent: {mutation:?}");
    }
}

/// The body of a head that is not applied, because it came too late or is too large.
#[test]
fn body_in_a_reply_to_the_head_needs_that_head() {
    let many: Vec<String> = (0..10_000).map(|n| format!("x-{n}")).collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "1")).collect();
    let without = format!("{:?}", Answer::WithoutHead);
    for mutation in [Mutation::Body("all".into()), Mutation::ClearBody(true), piece("all", true), piece("al", false)] {
        let last = |headers| last_at_response(headers, mutated(mutation.clone()));
        let found = run(&mut responding(), vec![last(&many)]).0;
        assert_eq!(found, ["excessive", without.as_str()], "{mutation:?}");
        let first = reply(Response::ResponseHeaders(HeadersResponse::default()));
        let found = run(&mut responding(), vec![first, last(&[])]).0;
        assert_eq!(found, ["response head 0", "response head 0", without.as_str()], "{mutation:?}");
        let mut gone = responding();
        assert!(gone.awaits_head_reply());
        gone.settle_head();
        assert!(!gone.awaits_head_reply());
        assert_eq!(run(&mut gone, vec![last(&[])]).0, ["response head 0", without.as_str()], "{mutation:?}");
    }
}

/// A request is asked again if its stream is lost before the EPP said anything about it.
#[test]
fn unchanged_piece_does_not_count_as_an_answer() {
    for (steps, answered) in [
        (vec![Piece, kept(), End, kept()], false),
        (vec![Piece, body(Mutation::ClearBody(false)), trailers()], false),
        (vec![Piece, no_pick()], true),
        (vec![Piece, streamed("new", false)], true),
        (vec![Piece, body(Mutation::ClearBody(true))], true),
        (vec![Piece, with_metadata(kept(), text(A))], true),
    ] {
        let shown = format!("{steps:?}");
        let mut exchange = exchange(true, None);
        assert_eq!(run(&mut exchange, steps).0, [""; 0], "{shown}");
        assert_eq!(exchange.answered(), answered, "{shown}");
    }
}

#[test]
fn request_without_body_is_decided_by_the_head_reply() {
    let mut exchange = exchange(false, None);
    assert_eq!(run(&mut exchange, vec![Piece, End, head(A)]), (vec!["10.0.0.1:1 original".to_owned()], 3));
    let Some(Request::RequestHeaders(head)) = exchange.next_message().and_then(|message| message.request) else {
        panic!("no head");
    };
    assert!(head.end_of_stream);
    assert!(!exchange.has_message(), "no body message");
}

#[test]
fn accumulated_mutations_over_the_limit_fail() {
    let mut exchange = exchange(true, None);
    // In addition to the head's own fields and pseudo-headers.
    let limit = EppLimits::default().fields + request().headers.len() + 4;
    for piece in 0..limit {
        step(&mut exchange, Piece);
        let common = CommonResponse { header_mutation: mutation(&[("x-a", "1"), ("x-b", "2")]), ..Default::default() };
        step(&mut exchange, reply(Response::RequestBody(BodyResponse { response: Some(common) })));
        match exchange.next_event() {
            None => assert!(2 * (piece + 1) <= limit, "{piece}"),
            Some(Err(PickError::MutationTooLarge { .. })) => return assert!(2 * (piece + 1) > limit, "{piece}"),
            Some(other) => panic!("{other:?}"),
        }
    }
    panic!("no failure");
}

#[test]
fn invalid_destination_is_quoted_in_the_error() {
    let mut exchange = exchange(true, None);
    for next in [End, head("10.0.0.1, pod-7:80, [::1]"), kept()] {
        step(&mut exchange, next);
    }
    let Some(Err(PickError::BadDestination(bad))) = exchange.next_event() else { panic!("accepted") };
    assert_eq!(bad, "10.0.0.1, pod-7:80, [::1]");
}

#[test]
fn mutations_of_head_and_body_replies_are_joined_without_the_pick() {
    let mut exchange = exchange(true, None);
    let common = |mutation| Some(CommonResponse { header_mutation: mutation, ..Default::default() });
    let mut first = mutation(&[("X-Gateway-Destination-Endpoint", A), ("traceparent", "t")]);
    first.as_mut().unwrap().remove_headers.push("x-token".into());
    let second = mutation(&[("x-model", "m")]);
    exchange.request_body(Bytes::new(), true);
    exchange.receive(ProcessingResponse {
        response: Some(Response::RequestHeaders(HeadersResponse { response: common(first) })),
        ..Default::default()
    });
    exchange.receive(ProcessingResponse {
        response: Some(Response::RequestBody(BodyResponse { response: common(second) })),
        ..Default::default()
    });
    let Some(Ok(Event::Outcome(Outcome::Picked(decision)))) = exchange.next_event() else { panic!("no decision") };
    assert_eq!(decision.mutation.set_headers, [option("traceparent", "t"), option("x-model", "m")]);
    assert_eq!(decision.mutation.remove_headers, ["x-token"]);
}

/// What a reply removes is gone, even if an earlier reply set it.
#[test]
fn mutations_are_applied_in_the_order_of_the_replies() {
    let mut exchange = exchange(true, None);
    let removes = |names: &[&str], set: &[(&str, &str)]| {
        let mut mutation = mutation(set).unwrap();
        mutation.remove_headers = names.iter().map(ToString::to_string).collect();
        Some(CommonResponse { header_mutation: Some(mutation), ..Default::default() })
    };
    let head = removes(&["x-id"], &[(message::DESTINATION, A), ("x-tmp", "1"), ("x-id", "new"), ("x-kept", "1")]);
    let body = removes(&["X-Tmp", "x-later"], &[("x-later", "2")]);
    exchange.request_body(Bytes::new(), true);
    step(&mut exchange, reply(Response::RequestHeaders(HeadersResponse { response: head })));
    step(&mut exchange, reply(Response::RequestBody(BodyResponse { response: body })));
    let Some(Ok(Event::Outcome(Outcome::Picked(decision)))) = exchange.next_event() else { panic!("no decision") };
    let mut headers = request().headers;
    headers.insert("x-tmp", http::HeaderValue::from_static("client's"));
    assert_eq!(mutation::apply(&decision.mutation, &mut headers), 0);
    assert_eq!((headers.get("x-tmp"), headers["x-id"].as_bytes()), (None, &b"new"[..]));
    assert_eq!((headers["x-kept"].as_bytes(), headers["x-later"].as_bytes()), (&b"1"[..], &b"2"[..]));
}

#[test]
fn grpc_status_of_an_immediate_reply_is_kept_if_grpc_defines_it() {
    for (given, kept) in [(None, None), (Some(0), Some(0)), (Some(8), Some(8)), (Some(17), None), (Some(65_544), None)]
    {
        let mut exchange = exchange(true, None);
        let grpc_status = given.map(|status| penstock_proto::ext_proc::GrpcStatus { status });
        let message = ImmediateResponse { grpc_status, ..Default::default() };
        step(&mut exchange, reply(Response::ImmediateResponse(message)));
        let Some(Ok(Event::Outcome(Outcome::Immediate(reply)))) = exchange.next_event() else { panic!("no reply") };
        assert_eq!(reply.grpc_status, kept, "{given:?}");
    }
}

#[test]
fn messages_carry_head_body_and_metadata() {
    let subset: Vec<SocketAddr> = vec![A.parse().unwrap(), "[::1]:2".parse().unwrap()];
    let mut exchange = exchange(true, Some(&subset));
    let large = Bytes::from(vec![b'x'; 2 * message::REQUEST_PIECE + 1]);
    exchange.request_body(large, false);
    exchange.request_body(Bytes::new(), false);
    exchange.request_body(Bytes::new(), true);
    exchange.request_body(Bytes::from_static(b"late"), true);
    let headers =
        [(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/event-stream"))].into_iter().collect();
    exchange.response_headers(http::StatusCode::OK, &headers, A.parse().unwrap(), false);
    exchange.response_end();
    exchange.response_end();

    let messages: Vec<_> = std::iter::from_fn(|| exchange.next_message()).collect();
    let pairs = |head: &HttpHeaders| -> Vec<(String, String)> {
        let all = head.headers.iter().flat_map(|map| &map.headers);
        all.map(|field| (field.key.clone(), String::from_utf8(field.raw_value.to_vec()).unwrap())).collect()
    };
    let short: Vec<_> = messages
        .iter()
        .map(|message| match message.request.as_ref().unwrap() {
            Request::RequestHeaders(head) => format!("head {:?} {}", pairs(head), head.end_of_stream),
            Request::ResponseHeaders(head) => format!("response {:?} {}", pairs(head), head.end_of_stream),
            Request::RequestBody(HttpBody { body, end_of_stream }) => format!("body {} {end_of_stream}", body.len()),
            Request::ResponseBody(HttpBody { body, end_of_stream }) => format!("answer {} {end_of_stream}", body.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    let head = r#"head [(":method", "POST"), (":path", "/v1/completions?x=1"), (":scheme", "http"), (":authority", "llm.example"), ("x-id", "7")] false"#;
    let response = r#"response [(":status", "200"), ("content-type", "text/event-stream")] false"#;
    let body = ["body 262144 false", "body 262144 false", "body 1 false", "body 0 true"];
    assert_eq!(short, [&[head][..], &body, &[response, "answer 0 true"]].concat());

    let configs: Vec<_> = messages.iter().map(|message| message.protocol_config).collect();
    assert_eq!(configs[0], Some(message::protocol_config()));
    assert!(configs[1..].iter().all(Option::is_none));
    for (index, message) in messages.iter().enumerate() {
        let metadata = &message.metadata_context.as_ref().expect("on every message").filter_metadata;
        let hint = &metadata["envoy.lb.subset_hint"].fields["x-gateway-destination-endpoint-subset"];
        let values = vec![Value { kind: Some(text(A)) }, Value { kind: Some(text("[::1]:2")) }];
        assert_eq!(hint.kind, Some(Kind::ListValue(ListValue { values })));
        let served = metadata.get("envoy.lb").map(|lb| &lb.fields["x-gateway-destination-endpoint-served"]);
        assert_eq!(served.and_then(|value| value.kind.clone()), (index >= 5).then(|| text(A)));
    }
}

#[test]
fn end_of_stream_is_on_the_last_piece_or_the_response_head() {
    let mut exchange = exchange(true, None);
    exchange.request_body(vec![b'x'; message::REQUEST_PIECE + 1].into(), true);
    exchange.response_headers(http::StatusCode::NO_CONTENT, &HeaderMap::new(), A.parse().unwrap(), true);
    exchange.response_end();
    let ends: Vec<_> = std::iter::from_fn(|| exchange.next_message())
        .map(|message| match message.request.unwrap() {
            Request::RequestHeaders(head) | Request::ResponseHeaders(head) => head.end_of_stream,
            Request::RequestBody(body) | Request::ResponseBody(body) => body.end_of_stream,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ends, [false, false, true, true]);
}

#[test]
fn response_body_is_sent_in_pieces_with_one_end() {
    let mut exchange = exchange(false, None);
    exchange.response_body(Bytes::from_static(b"early"), true);
    exchange.response_headers(http::StatusCode::OK, &HeaderMap::new(), A.parse().unwrap(), false);
    exchange.response_body(vec![b'x'; message::PIECE + 1].into(), false);
    exchange.response_body(Bytes::new(), false);
    exchange.response_body(vec![b'x'; message::PIECE].into(), true);
    exchange.response_body(Bytes::from_static(b"late"), false);
    exchange.response_end();
    let sent: Vec<_> = std::iter::from_fn(|| exchange.next_message())
        .filter_map(|message| match message.request.unwrap() {
            Request::ResponseBody(HttpBody { body, end_of_stream }) => Some((body.len(), end_of_stream)),
            _ => None,
        })
        .collect();
    assert_eq!(sent, [(message::PIECE, false), (1, false), (message::PIECE, true)]);
}

#[test]
fn empty_subset_is_sent_and_no_subset_sends_no_metadata() {
    assert_eq!(exchange(true, None).next_message().unwrap().metadata_context, None);
    let metadata = exchange(true, Some(&[])).next_message().unwrap().metadata_context.unwrap();
    let hint = &metadata.filter_metadata["envoy.lb.subset_hint"].fields["x-gateway-destination-endpoint-subset"];
    assert_eq!(hint.kind, Some(Kind::ListValue(ListValue { values: vec![] })));
}

#[test]
fn trailers_end_the_response_and_the_reply_to_them_is_an_event() {
    let mut exchange = exchange(false, None);
    exchange.obey();
    exchange.response_headers(http::StatusCode::OK, &HeaderMap::new(), "10.0.0.1:1".parse().unwrap(), false);
    exchange.response_body(Bytes::from_static(b"piece"), false);
    let trailers: HeaderMap = [(http::header::ETAG, http::HeaderValue::from_static("1"))].into_iter().collect();
    exchange.response_trailers(&trailers);
    exchange.response_end();
    exchange.response_trailers(&trailers);
    let sent: Vec<_> = std::iter::from_fn(|| exchange.next_message()).filter_map(|message| message.request).collect();
    let [.., Request::ResponseBody(last), Request::ResponseTrailers(end)] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!((last.end_of_stream, sent.len()), (false, 4));
    assert_eq!(end.trailers.as_ref().unwrap().headers[0].key, "etag");
    for (fields, applied) in [(1, true), (10_000, false)] {
        let names: Vec<String> = (0..fields).map(|n| format!("x-{n}")).collect();
        let change = mutation(&names.iter().map(|name| (name.as_str(), "1")).collect::<Vec<_>>());
        let response = Response::ResponseTrailers(TrailersResponse { header_mutation: change.clone() });
        step(&mut exchange, reply(response));
        let Some(Ok(found)) = exchange.next_event() else { panic!("no event") };
        assert_eq!(found, Event::ResponseTrailers(change.filter(|_| applied)), "{fields} fields");
    }
}

#[test]
fn reply_to_the_response_head_is_an_event() {
    let mut exchange = exchange(true, None);
    let response = Some(CommonResponse { header_mutation: mutation(&[("x-served", A)]), ..Default::default() });
    let steps = vec![End, head(A), kept(), reply(Response::ResponseHeaders(HeadersResponse { response }))];
    assert_eq!(run(&mut exchange, steps).0, ["10.0.0.1:1 original", "response head 1"]);
}

#[test]
fn replacement_without_memory_is_known_by_its_digest() {
    let pieces: Vec<Bytes> = (0..5_u8).map(|number| Bytes::from(vec![number; 3])).collect();
    let all = pieces.concat();
    // Memory for none, for some, and for all pieces.
    for (room, held) in [(0, false), (7, false), (15, true)] {
        let gauge = prometheus_client::metrics::gauge::Gauge::default();
        let mut replacement = Replacement::new(100, Budget::new(room, gauge.clone()));
        for (number, piece) in (1..).zip(&pieces) {
            let piece = StreamedBodyResponse { body: piece.clone(), end_of_stream: number == pieces.len() };
            replacement.reply(Some(Mutation::StreamedResponse(piece))).unwrap();
        }
        match replacement.take().unwrap() {
            Body::Replaced(given) => assert!(held && given.concat() == all),
            Body::DigestOnly(digest) => {
                assert!(!held && *digest == *ring::digest::digest(&ring::digest::SHA256, &all).as_ref());
                assert_eq!(gauge.get(), 0, "held pieces are released");
            }
            Body::Original | Body::Renamed(_) => panic!("{room}"),
        }
    }
}
