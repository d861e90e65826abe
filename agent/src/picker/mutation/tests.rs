//! Tests of header mutations.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use penstock_proto::{
    core::{self, HeaderValueOption, header_value_option::HeaderAppendAction},
    ext_proc::HeaderMutation,
};

use prost::Message as _;

use super::{apply, apply_to_request, apply_to_response};

const APPEND: i32 = HeaderAppendAction::AppendIfExistsOrAdd as i32;
const ABSENT: i32 = HeaderAppendAction::AddIfAbsent as i32;
const OVERWRITE: i32 = HeaderAppendAction::OverwriteIfExistsOrAdd as i32;
const EXISTING: i32 = HeaderAppendAction::OverwriteIfExists as i32;

fn headers(list: &[(&str, &str)]) -> HeaderMap {
    let pair = |(name, value): &(&str, &str)| {
        (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())
    };
    list.iter().map(pair).collect()
}

fn set(key: &str, value: &[u8], append: Option<bool>, append_action: i32) -> HeaderValueOption {
    let raw_value = Bytes::copy_from_slice(value);
    let header = Some(core::HeaderValue { key: key.into(), value: String::new(), raw_value });
    HeaderValueOption { header, append, append_action }
}

#[test]
fn entry_is_applied_by_its_action() {
    let before = [("a", "1"), ("a", "2"), ("host", "h"), ("content-length", "7"), ("connection", "close")];
    // name, value, append, append_action; the values of that name afterwards; entries skipped as invalid
    #[allow(clippy::type_complexity)]
    #[rustfmt::skip]
    let rows: &[(&str, &str, Option<bool>, i32, &[&str], usize)] = &[
        ("a", "3", None,        APPEND,    &["3"], 0),
        ("a", "3", Some(false), APPEND,    &["3"], 0),
        ("a", "3", Some(true),  APPEND,    &["1", "2", "3"], 0),
        ("a", "3", Some(true),  OVERWRITE, &["1", "2", "3"], 0),
        ("a", "2", Some(true),  APPEND,    &["1", "2", "2"], 0),
        ("a", "3", None,        OVERWRITE, &["3"], 0),
        ("a", "3", None,        ABSENT,    &["1", "2"], 0),
        ("a", "3", None,        EXISTING,  &["3"], 0),
        ("A", "3", None,        OVERWRITE, &["3"], 0),
        ("b", "3", None,        APPEND,    &["3"], 0),
        ("b", "3", Some(true),  APPEND,    &["3"], 0),
        ("b", "3", None,        ABSENT,    &["3"], 0),
        ("b", "3", None,        OVERWRITE, &["3"], 0),
        ("b", "3", None,        EXISTING,  &[], 0),
        ("b", "",  None,        APPEND,    &[""], 0),
        // An unknown action counts as 0.
        ("a", "3", None,        99,        &["3"], 0),
        // An echo of one of several values.
        ("a", "1", None,        APPEND,    &["1", "2"], 0),
        ("a", "2", None,        OVERWRITE, &["1", "2"], 0),
        ("host", "evil",          None, OVERWRITE, &["h"], 0),
        ("content-length", "9",   None, OVERWRITE, &["7"], 0),
        ("Connection", "upgrade", None, OVERWRITE, &["close"], 0),
        ("transfer-encoding", "chunked", None, OVERWRITE, &[], 0),
        ("x-envoy-original-path", "/",   None, OVERWRITE, &[], 0),
        (":path", "/other",   None, OVERWRITE, &[], 0),
        ("in valid", "x",     None, OVERWRITE, &[], 1),
        ("", "x",             None, OVERWRITE, &[], 1),
        ("b", "line\nbreak",  None, OVERWRITE, &[], 1),
    ];
    for row @ (name, value, append, action, after, invalid) in rows {
        let mut map = headers(&before);
        let set_headers = vec![set(name, value.as_bytes(), *append, *action)];
        let skipped = apply(&HeaderMutation { set_headers, remove_headers: vec![] }, &mut map);
        let values: Vec<_> = HeaderName::from_bytes(name.as_bytes())
            .map(|name| map.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect())
            .unwrap_or_default();
        assert_eq!((values, skipped), (after.iter().map(|s| (*s).to_owned()).collect(), *invalid), "{row:?}");
    }
}

/// Encoded by hand, with and without `keep_empty_value` (field 4, which the project's messages do not have).
#[test]
fn empty_value_is_set_whatever_keep_empty_value_says() {
    for keep_empty_value in [&[][..], &[0x20, 0], &[0x20, 1]] {
        let mut wire = set("a", b"", None, OVERWRITE).encode_to_vec();
        wire.extend_from_slice(keep_empty_value);
        let option = HeaderValueOption::decode(wire.as_slice()).unwrap();
        let mut map = headers(&[("a", "1")]);
        assert_eq!(apply(&HeaderMutation { set_headers: vec![option], remove_headers: vec![] }, &mut map), 0);
        assert_eq!(map, headers(&[("a", "")]));
    }
}

#[test]
fn removals_are_applied_first_and_spare_protected_fields() {
    let mut map = headers(&[("a", "1"), ("a", "2"), ("b", "1"), ("host", "h"), ("te", "trailers")]);
    let remove_headers = ["A", "b", "absent", "host", ":path", "te", "no good"].map(str::to_owned).to_vec();
    let skipped = apply(&HeaderMutation { set_headers: vec![set("b", b"2", None, 0)], remove_headers }, &mut map);
    assert_eq!(map, headers(&[("host", "h"), ("te", "trailers"), ("b", "2")]));
    assert_eq!(skipped, 1);
}

#[test]
fn value_is_raw_or_text_and_may_be_invalid_utf8() {
    let mut map = HeaderMap::new();
    let text = core::HeaderValue { key: "text".into(), value: "t".into(), raw_value: Bytes::new() };
    let both = core::HeaderValue { key: "both".into(), value: "t".into(), raw_value: Bytes::from_static(b"raw") };
    let plain = |header| HeaderValueOption { header: Some(header), append: None, append_action: 0 };
    let set_headers = vec![plain(text), plain(both), set("bytes", b"\xff\xfe", None, 0), HeaderValueOption::default()];
    assert_eq!(apply(&HeaderMutation { set_headers, remove_headers: vec![] }, &mut map), 1);
    assert_eq!((map["text"].as_bytes(), map["both"].as_bytes()), (&b"t"[..], &b"raw"[..]));
    assert_eq!(map["bytes"].as_bytes(), b"\xff\xfe");
}

/// It is not part of the value, and an HTTP/2 endpoint may end its connection for it.
#[test]
fn white_space_around_a_value_is_removed() {
    let mut fields = headers(&[("e", "same")]);
    let set_headers =
        vec![set("x", b" \tv w ", None, APPEND), set("y", b"  ", None, APPEND), set("e", b"same ", None, APPEND)];
    assert_eq!(apply(&HeaderMutation { set_headers, ..HeaderMutation::default() }, &mut fields), 0);
    assert_eq!(fields, headers(&[("e", "same"), ("x", "v w"), ("y", "")]));
}

#[test]
fn path_is_set_if_it_is_a_path() {
    const OWN: &str = "/v1/completions?x=1";
    #[rustfmt::skip]
    let rows: &[(&str, Option<bool>, i32, &str, usize)] = &[
        ("/v1/other?y=%20", None, OVERWRITE, "/v1/other?y=%20", 0),
        ("/v1/other", None, APPEND, "/v1/other", 0),
        ("/v1/other", None, EXISTING, "/v1/other", 0),
        ("/v1/other", None, ABSENT, OWN, 0),
        ("/v1/other", Some(true), OVERWRITE, OWN, 0),
        (OWN, None, OVERWRITE, OWN, 0),
        ("", None, OVERWRITE, OWN, 1),
        ("*", None, OVERWRITE, OWN, 1),
        ("http://evil/", None, OVERWRITE, OWN, 1),
        ("/a b", None, OVERWRITE, OWN, 1),
        ("/a\r\nx: y", None, OVERWRITE, OWN, 1),
        ("/a#b", None, OVERWRITE, OWN, 1),
        ("/\u{e4}", None, OVERWRITE, OWN, 1),
    ];
    for row @ (value, append, action, expected, invalid) in rows {
        for origin in ["", "http://models.example"] {
            let (mut parts, ()) = http::Request::post(format!("{origin}{OWN}")).body(()).unwrap().into_parts();
            let set_headers = vec![set(":path", value.as_bytes(), *append, *action)];
            let mutation = HeaderMutation { set_headers, remove_headers: vec![":path".to_owned()] };
            assert_eq!(apply_to_request(&mutation, &mut parts), *invalid, "{row:?}");
            assert_eq!(parts.uri.to_string(), format!("{origin}{expected}"), "{row:?}");
        }
    }
}

#[test]
fn status_is_set_if_the_framing_stays() {
    #[rustfmt::skip]
    let rows = [
        (200, "503", 503, 0), (200, "599", 599, 0), (404, "200", 200, 0), (200, "200", 200, 0), (304, "304", 304, 0),
        (200, "199", 200, 1), (200, "600", 200, 1), (200, "101", 200, 1), (200, "20", 200, 1), (200, "2000", 200, 1),
        (200, "", 200, 1), (200, "204", 200, 1), (200, "205", 200, 1), (200, "304", 200, 1), (204, "200", 204, 1),
        (304, "200", 304, 1), (101, "200", 101, 1),
    ];
    for row @ (own, value, expected, invalid) in rows {
        let mut status = StatusCode::from_u16(own).unwrap();
        let set_headers = vec![set(":status", value.as_bytes(), None, OVERWRITE)];
        let mutation = HeaderMutation { set_headers, remove_headers: vec![":status".to_owned()] };
        assert_eq!(apply_to_response(&mutation, &mut status, &mut HeaderMap::new()), invalid, "{row:?}");
        assert_eq!(status.as_u16(), expected, "{row:?}");
    }
}
