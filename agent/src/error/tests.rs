//! Tests error answers, and compares the reasons with `docs/errors.md`.

use std::collections::BTreeMap;

use bytes::BytesMut;
use http::{HeaderName, Method, Version};
use penstock_proto::ext_proc::HeaderMutation;

use super::*;
use crate::{
    bbr::{Found, JsonError},
    config::InferencePoolRef,
    deliver::End,
    http::{coding::CodingError, head::HeadError, response::ResponseError},
    kernel::wire::FlowStop,
};

fn manner(format: ErrorFormat) -> Manner<'static> {
    Manner { format, grpc: false, anthropic: false, request_id: None, own_id: None, grant: None }
}

fn written(error: &Error, manner: &Manner<'_>) -> (String, String) {
    let mut out = BytesMut::new();
    error.reply(manner).write(&mut out, &Method::POST, false, Version::HTTP_11);
    let text = String::from_utf8(out.to_vec()).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
    assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
    (head.to_owned(), body.to_owned())
}

#[test]
fn json_answer_carries_the_reason() {
    let (head, body) = written(&Error::BodyCut { found: 3 }, &manner(ErrorFormat::OpenAi));
    assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n") && head.contains("connection: close"), "{head}");
    assert!(head.contains("\r\nx-penstock-reason: body_cut\r\n"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).expect("json");
    assert_eq!(body["error"]["code"], "body_cut");
    assert_eq!(body["error"]["type"], "invalid_request_error");
    let keys: Vec<&String> = body["error"].as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["code", "message", "param", "type"]);
}

#[test]
fn anthropic_paths_get_anthropic_errors() {
    for path in [
        "/v1/messages",
        "/v1/messages/",
        "/v1/messages/count_tokens",
        "/a/b/v1/messages/batches/1",
        "http://h/v1/messages?beta=true",
    ] {
        assert!(is_messages(path), "{path}");
    }
    for path in [
        "/v1/chat/completions",
        "/v1/threads/1/messages",
        "/messages",
        "/v2/messages",
        "/v1/messages_2",
        "*",
        "",
        "/x?to=/v1/messages",
    ] {
        assert!(!is_messages(path), "{path}");
    }
    let id = HeaderValue::from_static("mine");
    let manner = Manner { own_id: Some(&id), ..manner(ErrorFormat::OpenAi) }.at("/v1/messages");
    let (head, body) = written(&Error::NoRoute, &manner);
    assert!(head.starts_with("HTTP/1.1 404 ") && head.contains("\r\nx-penstock-reason: no_route\r\n"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).expect("json");
    let error = serde_json::json!({ "type": "not_found_error", "message": "no route matches this request" });
    assert_eq!(body, serde_json::json!({ "type": "error", "error": error, "request_id": "mine" }));
    let (_, body) = written(&Error::NoRoute, &Manner { format: ErrorFormat::Plain, ..manner });
    assert!(body.ends_with("reason: no_route\n"), "{body}");
}

#[test]
fn text_answer_carries_the_reason() {
    let id = HeaderValue::from_static("mine");
    let manner = Manner { request_id: Some(&id), ..manner(ErrorFormat::Plain) };
    let (head, body) = written(&Error::NoRoute, &manner);
    assert!(head.contains("\r\ncontent-type: text/plain; charset=utf-8\r\nx-penstock-reason: no_route\r\n"), "{head}");
    assert!(head.contains("\r\nx-request-id: mine\r\n"), "{head}");
    assert_eq!(body, "no route matches this request\nreason: no_route\n");
}

#[test]
fn accept_header_and_configuration_choose_the_format() {
    let mut config = Config::new(Vec::new());
    let fields_of = |fields: &[(&'static str, &'static str)]| -> HeaderMap {
        fields.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    };
    let (none, text) = (fields_of(&[("x-request-id", "mine")]), fields_of(&[("accept", "text/plain")]));
    let json = fields_of(&[("accept", "application/json")]);
    let format = |headers: &HeaderMap, config: &Config| Manner::of(headers, config).format;
    use ErrorFormat::{OpenAi, Plain};
    for configured in [OpenAi, Plain] {
        config.errors.format = configured;
        let found = [&none, &text, &json].map(|headers| format(headers, &config));
        assert_eq!(found, [configured, Plain, OpenAi]);
        assert_eq!(Manner::unknown(&config).format, configured);
    }
    let marked = |config: &Config| {
        let mut answer = fields_of(&[("x-request-id", "theirs")]);
        Manner::of(&none, config).mark(&mut answer);
        answer[headers::X_REQUEST_ID].clone()
    };
    assert_eq!(marked(&config), "theirs");
    config.headers.request_id_to_client = true;
    assert_eq!(marked(&config), "mine");
}

/// One error of each kind.
#[expect(clippy::too_many_lines, reason = "a list of all errors")]
fn every_error() -> Vec<Error> {
    let found = String::new;
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let second = Duration::from_secs(1);
    let heads = [
        HeadError::TooLong { limit: 1 },
        HeadError::NameTooLong { limit: 1 },
        HeadError::TooManyFields { limit: 1 },
        HeadError::BareLf { line: found() },
        HeadError::BareCr { line: found() },
        HeadError::Control { byte: 0, line: found() },
        HeadError::FoldedLine { line: found() },
        HeadError::BlankBeforeColon { line: found() },
        HeadError::FieldLine { line: found() },
        HeadError::ContentLength { found: found() },
        HeadError::ContentLengthRepeated { found: found() },
        HeadError::LengthAndEncoding { found: found() },
        HeadError::TransferEncoding { found: found() },
        HeadError::TransferCoding { found: found() },
        HeadError::TransferEncodingInHttp10 { found: found() },
    ];
    let requests = [
        RequestError::BlankLines,
        RequestError::RequestLine { found: found() },
        RequestError::RequestLineTooLong { limit: 1 },
        RequestError::TargetTooLong { limit: 1 },
        RequestError::Http2Preface,
        RequestError::Version { found: found() },
        RequestError::Method { found: found() },
        RequestError::Target { found: found() },
        RequestError::Asterisk { method: found() },
        RequestError::HostMissing,
        RequestError::HostRepeated { found: found() },
        RequestError::Host { found: found() },
        RequestError::HostMismatch { target: found(), host: found() },
        RequestError::Expectation { found: found() },
    ];
    let bodies = [
        BodyError::TooLarge { limit: 1 },
        BodyError::Chunk { found: found() },
        BodyError::Trailers,
        BodyError::Trailer,
        BodyError::Overhead { found: 1, payload: 0 },
        BodyError::File(io::ErrorKind::StorageFull.into()),
        BodyError::Full { at: "" },
    ];
    let json = JsonError { offset: 0, found: Found::EndOfInput, expected: "" };
    let connect = |kind: io::ErrorKind| Error::Connect { address, error: kind.into() };
    let reply = ImmediateReply {
        status: StatusCode::TOO_MANY_REQUESTS,
        headers: HeaderMutation::default(),
        body: bytes::Bytes::new(),
        grpc_status: None,
        details: found(),
    };
    let others = [
        Error::Naming(NamingError::Json(json)),
        Error::Naming(NamingError::Missing { found: "nothing" }),
        Error::Naming(NamingError::Form(crate::bbr::form::FormError::Second)),
        Error::Naming(NamingError::Coding(CodingError::Unsupported { found: found() })),
        Error::Naming(NamingError::Coding(CodingError::Corrupt { coding: "br", reason: found() })),
        Error::Naming(NamingError::Coding(CodingError::Truncated { coding: "br" })),
        Error::Naming(NamingError::Coding(CodingError::TooLarge { limit: 1 })),
        Error::Naming(NamingError::Coding(CodingError::NoRoom)),
        Error::BodyCut { found: 1 },
        Error::HeadCut,
        Error::HeadTimeout(second),
        Error::BodyTimeout(second),
        Error::BodySlow(1),
        Error::RequestTimeout(second),
        Error::NoRoute,
        Error::Redirected { status: StatusCode::FOUND, location: HeaderValue::from_static("/") },
        Error::Route(RefusedRoute::NoRoute),
        Error::Route(RefusedRoute::Unread(String::new())),
        Error::Route(RefusedRoute::Absent(String::new())),
        Error::Route(RefusedRoute::Unsupported(String::new())),
        Error::Route(RefusedRoute::Backend(String::new())),
        Error::Pool(UnusablePool::Unread(InferencePoolRef::default())),
        Error::Pool(UnusablePool::Absent(InferencePoolRef::default())),
        Error::Pool(UnusablePool::Invalid(InferencePoolRef::default(), String::new())),
        Error::Picker(PickError::Deadline),
        Error::Stranger(address),
        Error::NoEndpoint(NoEndpoint::NoneEligible),
        Error::NoEndpoint(NoEndpoint::Saturated),
        connect(io::ErrorKind::ConnectionRefused),
        connect(io::ErrorKind::TimedOut),
        Error::EndpointClosed(address),
        Error::EndpointTls { address, error: io::ErrorKind::InvalidData.into() },
        Error::LocalFault { address, error: io::ErrorKind::AddrNotAvailable.into() },
        Error::RequestStalled { address, limit: second },
        Error::FirstByte(address),
        Error::Loop,
        Error::OwnListener(address),
        Error::Response { address, error: ResponseError::SwitchingProtocols },
        Error::Evicted(Box::new(reply)),
        Error::TooManyConnections,
        Error::Stopped,
        Error::Panicked,
        Error::ClientGone,
    ];
    let heads = heads.into_iter().map(|fault| Error::Request(fault.into()));
    let requests = requests.into_iter().map(Error::Request);
    heads.chain(requests).chain(bodies.into_iter().map(Error::Body)).chain(others).collect()
}

/// The labels that the `fn reason` functions of a source file can return.
fn labels(source: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for function in source.split("fn reason(").skip(1) {
        let body = function.split("\n    }\n").next().expect("a function ends");
        found.extend(body.split('"').skip(1).step_by(2));
    }
    assert!(!found.is_empty());
    found
}

/// The rows of a section of `docs/errors.md`: the reason and the next column.
fn rows(title: &str) -> BTreeMap<String, String> {
    let text = include_str!("../../../docs/errors.md");
    let (_, section) = text.split_once(&format!("## {title}\n")).expect(title);
    let section = section.split("\n## ").next().expect("a section");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")).map(|row| {
        let (reason, rest) = row.split_once("` | ").expect(row);
        (reason.to_owned(), rest.split(" |").next().expect(row).to_owned())
    });
    let list: Vec<_> = rows.collect();
    let map: BTreeMap<_, _> = list.iter().cloned().collect();
    assert_eq!(list.len(), map.len(), "a reason is listed twice");
    map
}

/// Every error is documented with its status, and nothing else is.
#[test]
fn every_reason_is_documented_with_its_status() {
    let status = |error: &Error| match error {
        Error::Evicted(_) => "the EPP's".to_owned(),
        Error::Redirected { .. } => "the route's".to_owned(),
        error => error.status().as_u16().to_string(),
    };
    let every: BTreeMap<String, String> =
        every_error().iter().map(|error| (error.reason().to_owned(), status(error))).collect();
    assert_eq!(rows("Before the response has begun"), every);
    // Checks that `every_error` is complete.
    let sources = [
        include_str!("../error.rs"),
        include_str!("../bbr/error.rs"),
        include_str!("../http/head.rs"),
        include_str!("../http/request.rs"),
        include_str!("../http/body.rs"),
    ];
    let mut in_sources: Vec<&str> = sources.iter().flat_map(|source| labels(source)).collect();
    in_sources.sort_unstable();
    in_sources.dedup();
    assert_eq!(in_sources, every.keys().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn every_reason_after_the_response_began_is_documented() {
    let stops = [FlowStop::Deleted, FlowStop::Unrouted].map(End::Stopped);
    let ends = [End::ClientGone, End::Broken, End::Idle, End::Left].into_iter().chain(stops);
    let ends = ends.map(|end| end.reason().to_owned());
    let documented = rows("After the response has begun");
    let aborted = ["agent_stopped", "evicted", "picker_failed", "request_timeout"].map(str::to_owned);
    let mut expected: Vec<_> = ends.chain(aborted).collect();
    expected.sort_unstable();
    assert_eq!(documented.into_keys().collect::<Vec<_>>(), expected);
    let mut in_source = labels(include_str!("../deliver.rs"));
    // A tunnel that was asked to stop is not a broken response.
    in_source.retain(|&label| label != crate::metrics::OK && label != End::Over.reason());
    assert_eq!(in_source.len(), 4);
}
