//! CORS (Fetch Standard, section 3.3): the agent's answers to preflights, and the fields of responses to pages of other origins.
//!
//! Pure functions over heads and the settings of `[listen.cors]`.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request};

use super::{head::joined, reply::Reply};
use crate::config::{AllowedHeader, Cors};

/// Of a response, what tells a browser about other origins.
const FIELDS: [HeaderName; 6] = [
    header::ACCESS_CONTROL_ALLOW_ORIGIN,
    header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    header::ACCESS_CONTROL_ALLOW_METHODS,
    header::ACCESS_CONTROL_ALLOW_HEADERS,
    header::ACCESS_CONTROL_EXPOSE_HEADERS,
    header::ACCESS_CONTROL_MAX_AGE,
];
/// The most bytes of field names that the answer to a preflight repeats.
const REPEATED: usize = 4096;

/// Whether the request asks in advance what a page of another origin may do.
pub fn is_preflight(request: &request::Parts) -> bool {
    request.method == Method::OPTIONS
        && request.headers.contains_key(header::ORIGIN)
        && request.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Which origin a response may be read by.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The value of `Access-Control-Allow-Origin`; `None` if the request names no origin, or one that is not allowed.
    origin: Option<HeaderValue>,
}

impl Grant {
    /// That of a request with these headers.
    pub fn of(cors: &Cors, request: &HeaderMap) -> Self {
        let mut named = request.get_all(header::ORIGIN).iter();
        let origin = match (named.next(), named.next()) {
            (Some(origin), None) => origin.to_str().ok().map(|text| (origin, text)),
            _ => None,
        };
        let allowed = origin.filter(|(_, text)| cors.allow_origins.iter().any(|pattern| pattern.matches(text)));
        let value = |origin: &HeaderValue| {
            if cors.allows_any_origin() { HeaderValue::from_static("*") } else { origin.clone() }
        };
        Self { origin: allowed.map(|(origin, _)| value(origin)) }
    }

    /// Sets the fields of a response, and removes those of anyone else.
    pub fn apply(&self, cors: &Cors, response: &mut HeaderMap) {
        for name in &FIELDS {
            response.remove(name);
        }
        if !cors.allows_any_origin() {
            // Caches must not give the response to another origin.
            add_vary(response, "origin");
        }
        let Some(origin) = &self.origin else { return };
        response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        if cors.allow_credentials {
            response.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        if !cors.expose_headers.is_empty() {
            set(response, header::ACCESS_CONTROL_EXPOSE_HEADERS, &list(&cors.expose_headers));
        }
    }

    /// Answers a preflight.
    pub fn preflight(&self, cors: &Cors, request: &HeaderMap) -> Reply {
        let mut headers = HeaderMap::new();
        self.apply(cors, &mut headers);
        headers.remove(header::ACCESS_CONTROL_EXPOSE_HEADERS);
        add_vary(&mut headers, "access-control-request-headers");
        if self.origin.is_some() {
            let methods: Vec<&str> = cors.allow_methods.iter().map(Method::as_str).collect();
            set(&mut headers, header::ACCESS_CONTROL_ALLOW_METHODS, &methods.join(", "));
            let allowed = allowed_headers(cors, request);
            if !allowed.is_empty() {
                set(&mut headers, header::ACCESS_CONTROL_ALLOW_HEADERS, &allowed);
            }
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, cors.max_age.as_secs().into());
        }
        Reply { status: StatusCode::NO_CONTENT, headers, body: Bytes::new() }
    }
}

/// The fields that a page may send. A `*` in a response would not cover Authorization, so that what was asked for is repeated.
fn allowed_headers<'c>(cors: &'c Cors, request: &HeaderMap) -> Cow<'c, str> {
    if !cors.allow_headers.contains(&AllowedHeader::Any) {
        let named = cors.allow_headers.iter().filter_map(|header| match header {
            AllowedHeader::Named(name) => Some(name.as_str()),
            AllowedHeader::Any => None,
        });
        return named.collect::<Vec<_>>().join(", ").into();
    }
    let asked = joined(request, &header::ACCESS_CONTROL_REQUEST_HEADERS);
    let mut names: Vec<String> = Vec::new();
    let mut length = 0;
    for name in asked.split(|&byte| byte == b',').filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()) {
        length += name.as_str().len() + 2;
        if length > REPEATED {
            break;
        }
        names.push(name.as_str().to_owned());
    }
    names.join(", ").into()
}

fn list(names: &[HeaderName]) -> String {
    names.iter().map(HeaderName::as_str).collect::<Vec<_>>().join(", ")
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Adds to what a response depends on.
fn add_vary(headers: &mut HeaderMap, name: &'static str) {
    let vary = joined(headers, &header::VARY);
    let is_there = |element: &[u8]| element == b"*" || element.eq_ignore_ascii_case(name.as_bytes());
    if !vary.split(|&byte| byte == b',').any(|element| is_there(element.trim_ascii())) {
        headers.append(header::VARY, HeaderValue::from_static(name));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::OriginPattern;

    fn cors(origins: &[&str]) -> Cors {
        let pattern = |text: &&str| match *text {
            "*" => OriginPattern::Any,
            text => OriginPattern::Exact(text.to_owned()),
        };
        Cors { allow_origins: origins.iter().map(pattern).collect(), ..Cors::default() }
    }

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for &(name, value) in fields {
            map.append(name, HeaderValue::from_static(value));
        }
        map
    }

    /// The fields that [`Grant::apply`] leaves of `response`.
    fn applied(cors: &Cors, request: &HeaderMap, response: &HeaderMap) -> Vec<(String, String)> {
        let mut response = response.clone();
        Grant::of(cors, request).apply(cors, &mut response);
        fields(&response)
    }

    fn fields(headers: &HeaderMap) -> Vec<(String, String)> {
        let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
        let mut all: Vec<_> = headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        all.sort();
        all
    }

    fn expected(fields: &[(&str, &str)]) -> Vec<(String, String)> {
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn responses_get_the_fields_of_their_origin_and_no_others() {
        let one =
            Cors { allow_credentials: true, expose_headers: vec![header::ETAG, header::AGE], ..cors(&["https://a"]) };
        let endpoint = headers(&[
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("access-control-expose-headers", "x-secret"),
            ("vary", "accept, Origin"),
            ("x", "kept"),
        ]);
        let asked = |origin| headers(&[("origin", origin)]);
        let kept = [("vary", "accept, Origin"), ("x", "kept")];
        let granted = [
            ("access-control-allow-credentials", "true"),
            ("access-control-allow-origin", "https://a"),
            ("access-control-expose-headers", "etag, age"),
            kept[0],
            kept[1],
        ];
        assert_eq!(applied(&one, &asked("https://a"), &endpoint), expected(&granted));
        for request in [asked("https://b"), asked("null"), HeaderMap::new()] {
            assert_eq!(applied(&one, &request, &endpoint), expected(&kept));
        }
        // No browser sends two.
        let twice = headers(&[("origin", "https://a"), ("origin", "https://a")]);
        assert_eq!(applied(&one, &twice, &HeaderMap::new()), expected(&[("vary", "origin")]));
        let any = [("access-control-allow-origin", "*")];
        assert_eq!(applied(&cors(&["*"]), &asked("https://b"), &HeaderMap::new()), expected(&any));
        assert_eq!(applied(&cors(&["*"]), &HeaderMap::new(), &HeaderMap::new()), expected(&[]));
    }

    #[test]
    fn preflights_are_answered_for_allowed_origins() {
        let cors = Cors { max_age: Duration::from_secs(60), ..cors(&["https://a"]) };
        let asked = |origin| {
            headers(&[
                ("origin", origin),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", "Authorization, x-stainless-os, b d,"),
            ])
        };
        let answer = |cors: &Cors, origin| {
            let reply = Grant::of(cors, &asked(origin)).preflight(cors, &asked(origin));
            assert_eq!((reply.status, reply.body.len()), (StatusCode::NO_CONTENT, 0));
            fields(&reply.headers)
        };
        let vary = [("vary", "access-control-request-headers"), ("vary", "origin")];
        let granted = [
            ("access-control-allow-headers", "authorization, x-stainless-os"),
            ("access-control-allow-methods", "GET, HEAD, POST"),
            ("access-control-allow-origin", "https://a"),
            ("access-control-max-age", "60"),
        ];
        assert_eq!(answer(&cors, "https://a"), expected(&[&granted[..], &vary].concat()));
        assert_eq!(answer(&cors, "https://b"), expected(&vary));
        let named = Cors { allow_headers: vec![AllowedHeader::Named(header::AUTHORIZATION)], ..cors };
        let headers = answer(&named, "https://a");
        assert!(
            headers.contains(&("access-control-allow-headers".to_owned(), "authorization".to_owned())),
            "{headers:?}"
        );
    }

    #[test]
    fn repeated_names_are_bounded() {
        let long = vec!["x".repeat(100); 100].join(",");
        let mut request = headers(&[("origin", "https://a")]);
        request.insert(header::ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_str(&long).unwrap());
        assert_eq!(allowed_headers(&cors(&["*"]), &request).len(), 40 * 102 - 2);
    }
}
