//! What a route does with a request besides choosing a pool: fields that it changes, a target that it rewrites, a redirect that
//! answers the request.

use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::json;

use super::{
    document::Section,
    routes::PathPattern,
    settings::{Group, choice, keys, settings, tables},
    value::{self, Value, integer},
};

settings! {
    /// Header fields of a request that the route changes, after the client's fields were filtered and before the EPP is asked.
    pub struct FieldChanges {
        /// Fields to set. All lines of the same name are replaced.
        pub set: Vec<SetField> = Vec::new()
            => tables(FIELDS).example(json!([{ "name": "x-team", "value": "red" }])),
        /// Fields to add, on a line of their own.
        pub add: Vec<SetField> = Vec::new()
            => tables(FIELDS).example(json!([{ "name": "x-seen", "value": "1" }])),
        /// Names of fields to remove.
        pub remove: Vec<HeaderName> = Vec::new() => value::header_name().list("an array of names of headers"),
    }
}

const FIELDS: &str = r#"an array of { name = "x-team", value = "red" }"#;

settings! {
    /// A field with a value.
    pub struct SetField {
        /// Name of the header. It must not frame the message or belong to the connection.
        pub name: HeaderName = HeaderName::from_static("x") => value::header_name().required("the name of a header", "x-team"),
        /// The value.
        pub value: HeaderValue = HeaderValue::from_static("") => field_value().required("the value of a header", "red"),
    }
}

settings! {
    /// The target that the endpoint gets instead of the client's. The EPP gets it, too; the access log names the client's.
    pub struct Rewrite {
        /// Host instead of the client's. `X-Forwarded-Host` keeps the client's.
        pub host: Option<String> = None => value::host().optional("llm.internal"),
        /// Path instead of the client's. The query stays.
        pub path: Option<PathChange> = None => keys::<PathChangeKeys>(),
    }
}

settings! {
    /// Answers requests of the route with a redirect instead of forwarding them. Excludes `pool`, `pools`, `rewrite` and
    /// `request_headers`.
    pub struct Redirect {
        /// Scheme of the new location: `http` or `https`. Unset: that of the request.
        pub scheme: Option<RedirectScheme> = None => value::choice().optional("https"),
        /// Host of the new location. Unset: that of the request.
        pub host: Option<String> = None => value::host().optional("llm.example.com"),
        /// Port of the new location. Unset: the one that belongs to `scheme`, or the request's if `scheme` is unset.
        pub port: Option<u16> = None => integer(1..=u16::MAX).optional(8443),
        /// Path of the new location. The query stays.
        pub path: Option<PathChange> = None => keys::<PathChangeKeys>(),
        /// Status of the answer.
        pub status: RedirectStatus = RedirectStatus::Found => redirect_status(),
    }
}

choice! {
    /// The scheme of a redirect.
    pub enum RedirectScheme {
        /// `http://`
        Http = "http",
        /// `https://`
        Https = "https",
    }
}

/// The status of a redirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedirectStatus {
    /// 301
    MovedPermanently,
    /// 302
    Found,
    /// 303
    SeeOther,
    /// 307
    TemporaryRedirect,
    /// 308
    PermanentRedirect,
}

/// How a path changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathChange {
    /// This path instead of the whole one.
    Full(String),
    /// This instead of the prefix that the route's `path_prefix` matched. Without slash at the end, so `/` is empty.
    Prefix(String),
}

settings! {
    /// A path that changes.
    struct PathChangeKeys {
        /// The whole path, instead of the client's.
        path: Option<String> = None => target_path().optional("/v1/chat/completions"),
        /// Replaces the prefix that the route's `path_prefix` matched, instead of `path`: with `path_prefix = "/team"` in the route
        /// and `path_prefix = "/v1"` here, `/team/models` becomes `/v1/models`.
        path_prefix: Option<String> = None => target_path().optional("/v1"),
    }
}

fn target_path() -> Value<String> {
    value::string(r#"a path of printable ASCII that starts with "/", without query"#, is_target_path)
}

/// Whether the text can be the path of a request.
pub fn is_target_path(text: &str) -> bool {
    text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) && !text.contains(['?', '#'])
}

fn field_value() -> Value<HeaderValue> {
    let parse = |text: &str| HeaderValue::from_str(text).ok().filter(|_| text.trim() == text);
    let show = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    Value::text("a header value without surrounding white space", parse, show)
}

fn redirect_status() -> Value<RedirectStatus> {
    let all = RedirectStatus::ALL.map(|status| status.code().as_u16());
    Value::new(
        "301, 302, 303, 307 or 308",
        json!({ "enum": all }),
        |value| integer(301..=308_u16).parse(value).ok().and_then(RedirectStatus::of),
        |status| json!(status.code().as_u16()),
    )
}

impl RedirectStatus {
    const ALL: [Self; 5] =
        [Self::MovedPermanently, Self::Found, Self::SeeOther, Self::TemporaryRedirect, Self::PermanentRedirect];

    /// The status with this number.
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.code() == number)
    }

    /// The status.
    pub fn code(self) -> StatusCode {
        match self {
            Self::MovedPermanently => StatusCode::MOVED_PERMANENTLY,
            Self::Found => StatusCode::FOUND,
            Self::SeeOther => StatusCode::SEE_OTHER,
            Self::TemporaryRedirect => StatusCode::TEMPORARY_REDIRECT,
            Self::PermanentRedirect => StatusCode::PERMANENT_REDIRECT,
        }
    }
}

impl RedirectScheme {
    /// Its name in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl PathChange {
    /// The replacement of a prefix.
    pub fn prefix(replacement: &str) -> Self {
        Self::Prefix(replacement.trim_end_matches('/').to_owned())
    }
}

/// A prefix as the file has it.
pub(super) fn or_root(prefix: String) -> String {
    if prefix.is_empty() { "/".to_owned() } else { prefix }
}

impl Group for PathChangeKeys {
    type Value = Option<PathChange>;

    fn resolve(self, section: &Section<'_>) -> Option<PathChange> {
        if section.has("path") && section.has("path_prefix") {
            section.reject("path_prefix", "a second change of the path", "path or path_prefix");
        }
        self.path.map(PathChange::Full).or_else(|| self.path_prefix.as_deref().map(PathChange::prefix))
    }

    fn of(value: &Option<PathChange>) -> Self {
        match value.clone() {
            Some(PathChange::Full(path)) => Self { path: Some(path), path_prefix: None },
            Some(PathChange::Prefix(prefix)) => Self { path: None, path_prefix: Some(or_root(prefix)) },
            None => Self::default(),
        }
    }
}

/// Rejects a change of a prefix in a route that matches no prefix.
pub(super) fn check(change: Option<&PathChange>, condition: Option<&PathPattern>, section: &Section<'_>) {
    if matches!(change, Some(PathChange::Prefix(_))) && !matches!(condition, Some(PathPattern::Prefix(_))) {
        section.reject("path_prefix", "a prefix to replace in a route without one", "path_prefix in the route");
    }
}
