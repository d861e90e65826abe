//! Decides whether an EPP's mutation of a request changes anything.
//!
//! Takes the mutation, the request as it was sent to the EPP and the length of its body. Existing EPPs set every field that they
//! received, and the body's length, again: such echoes are not changes. Fields that carry the pick or the trace are not either.

use http::{HeaderName, header, request};
use penstock_proto::{core::HeaderValueOption, ext_proc::HeaderMutation};

use super::{
    message::{self, DESTINATION},
    mutation::{self, Field, classify, new_path},
};
use crate::http::fields::X_PENSTOCK_BODY_LENGTH;

/// Fields that carry trace context, W3C's and older ones.
const TRACE: [&str; 9] = [
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "uber-trace-id",
    "x-cloud-trace-context",
    "x-amzn-trace-id",
    "grpc-trace-bin",
    "sw8",
];
const TRACE_PREFIXES: [&str; 3] = ["x-b3-", "x-ot-span-", "x-datadog-"];

/// Whether the mutation changes the request. `length` is the body's length in bytes, `None` if the EPP got an abridged body. A
/// removed field counts as a change even if this request does not have it, because later requests of the connection may.
pub fn changes(mutation: &HeaderMutation, request: &request::Parts, length: Option<u64>) -> bool {
    let removes = mutation.remove_headers.iter().any(|name| !is_exempt(name));
    removes || mutation.set_headers.iter().any(|option| !is_echo(option, request, length))
}

fn is_echo(option: &HeaderValueOption, request: &request::Parts, length: Option<u64>) -> bool {
    let Some(field) = &option.header else { return true };
    if mutation::is_echo(field, option, &request.headers) || is_exempt(&field.key) {
        return true;
    }
    let value = message::value(field);
    if let Some(path) = new_path(option, &request.uri) {
        // An invalid one is not applied.
        return path.is_err();
    }
    match classify(&field.key) {
        Field::Header(_) => false,
        // Never applied, but a different length means that the EPP decided about another body.
        Field::Protected if header::CONTENT_LENGTH.as_str().eq_ignore_ascii_case(&field.key) => {
            length.is_none_or(|length| value.trim_ascii() == length.to_string().as_bytes())
        }
        Field::Protected | Field::Invalid => true,
    }
}

/// Whether the field carries the pick or trace context, or is meant for the EPP.
fn is_exempt(name: &str) -> bool {
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else { return false };
    let name = name.as_str();
    name.starts_with(DESTINATION)
        || name == X_PENSTOCK_BODY_LENGTH
        || TRACE.contains(&name)
        || TRACE_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use penstock_proto::core::HeaderValue;

    use super::*;

    fn request() -> request::Parts {
        let request = http::Request::post("/v1/completions").header("host", "h").header("x-a", "1").header("x-a", "2");
        request.header("authorization", "Bearer alice").header("content-length", "10").body(()).unwrap().into_parts().0
    }

    fn set(key: &str, value: &str) -> HeaderValueOption {
        let raw_value = Bytes::copy_from_slice(value.as_bytes());
        let header = HeaderValue { key: key.to_owned(), value: String::new(), raw_value };
        HeaderValueOption { header: Some(header), ..Default::default() }
    }

    fn changed(set_headers: Vec<HeaderValueOption>, removed: &[&str]) -> bool {
        let remove_headers = removed.iter().map(ToString::to_string).collect();
        changes(&HeaderMutation { set_headers, remove_headers }, &request(), Some(10))
    }

    #[test]
    fn echoes_pick_and_trace_fields_are_not_changes() {
        let echoes = [
            ("x-a", "1"),
            ("X-A", "2"),
            ("authorization", "Bearer alice"),
            ("Content-Length", "10"),
            (":path", "/v1/completions"),
            (":path", "no path"),
            ("host", "h"),
            ("x-gateway-destination-endpoint", "10.0.0.1:8000"),
            ("x-gateway-destination-endpoint-subset", "10.0.0.1:8000"),
            ("traceparent", "00-1-2-01"),
            ("X-B3-TraceId", "1"),
            ("x-penstock-body-length", "70000"),
        ];
        for (key, value) in echoes {
            assert!(!changed(vec![set(key, value)], &[]), "{key}: {value}");
        }
        assert!(!changed(vec![], &["x-gateway-destination-endpoint-subset"]));
    }

    #[test]
    fn any_other_field_is_a_change() {
        let changes = [
            ("x-prefiller-host-port", "10.0.0.9:8000"),
            ("authorization", "Bearer bob"),
            ("x-a", "3"),
            ("content-length", "11"),
            ("x-request-id", "1"),
            (":path", "/v1/completions?x=1"),
        ];
        for (key, value) in changes {
            assert!(changed(vec![set(key, value)], &[]), "{key}: {value}");
        }
        assert!(changed(vec![], &["authorization"]));
        assert!(changed(vec![], &["x-absent"]));
        let other_length = HeaderMutation { set_headers: vec![set("content-length", "11")], remove_headers: vec![] };
        assert!(!super::changes(&other_length, &request(), None), "the length of an abridged body");
        let appended = HeaderValueOption { append: Some(true), ..set("x-a", "1") };
        assert!(changed(vec![appended], &[]));
    }
}
