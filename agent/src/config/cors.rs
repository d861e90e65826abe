//! `[listen.cors]`: which web pages of other origins may use the agent from a browser.

use std::{fmt, time::Duration};

use http::{HeaderName, Method, header};
use serde_json::json;

use super::{
    document::Section,
    settings::settings,
    value::{self, Value, boolean, duration},
};

settings! {
    /// Requests that browsers send for web pages of other origins (CORS). With this section, the agent answers preflights itself, sets
    /// the `Access-Control-` fields of every response, its own errors among them, and removes those of endpoints. Without it,
    /// preflights and fields pass between client and endpoint.
    pub struct Cors {
        /// Origins whose pages may read responses: `"https://app.example.com"`, `"https://*.example.com"` for every name below it, or
        /// `"*"` alone for any.
        pub allow_origins: Vec<OriginPattern> = Vec::new() => origin().list("an array of origins").example(json!(["https://app.example.com"])),
        /// Methods that pages may use.
        pub allow_methods: Vec<Method> = vec![Method::GET, Method::HEAD, Method::POST]
            => value::method(|_| true).list("an array of methods"),
        /// Header fields that pages may send, or `"*"` for any.
        pub allow_headers: Vec<AllowedHeader> = vec![AllowedHeader::Any] => allowed_header().list("an array of names of headers"),
        /// Header fields of responses that pages may read, besides those that they always may.
        pub expose_headers: Vec<HeaderName> = Vec::new() => any_name().list("an array of names of headers"),
        /// Whether pages may send cookies and other credentials of the browser. Not with `allow_origins = ["*"]`.
        pub allow_credentials: bool = false => boolean(),
        /// How long a browser may remember the answer to a preflight.
        pub max_age: Duration = Duration::from_secs(600) => duration(),
    }
}

/// Origins that a pattern matches. Browsers send them in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OriginPattern {
    /// `*`: any origin.
    Any,
    /// `https://app.example.com`
    Exact(String),
    /// `https://*.example.com:8443`
    Below {
        /// With `://`.
        scheme: String,
        /// From the dot on, with the port.
        name: String,
    },
}

/// Header fields that pages may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedHeader {
    /// `*`: any field.
    Any,
    /// This field.
    Named(HeaderName),
}

impl OriginPattern {
    /// Whether the pattern matches this value of an Origin field.
    pub fn matches(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact == origin,
            Self::Below { scheme, name } => {
                let below = origin.strip_prefix(scheme.as_str()).and_then(|rest| rest.strip_suffix(name.as_str()));
                let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
                below.is_some_and(|below| {
                    !below.is_empty() && below.bytes().all(is_name) && !below.starts_with('.') && !below.ends_with('.')
                })
            }
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        let (scheme, authority) = text.split_once("://")?;
        let is_scheme =
            !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
        let (below, authority) = match authority.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, authority),
        };
        // The port is not a part of a host in brackets.
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (authority, None),
        };
        let is_port = port.is_none_or(|port| !port.starts_with('0') && port.parse::<u16>().is_ok());
        if !is_scheme || !value::is_host(host) || !is_port || (below && host.starts_with('[')) {
            return None;
        }
        let text = text.to_ascii_lowercase();
        Some(match text.split_once("*.") {
            Some((scheme, name)) => Self::Below { scheme: scheme.to_owned(), name: format!(".{name}") },
            None => Self::Exact(text),
        })
    }
}

impl fmt::Display for OriginPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(exact) => f.write_str(exact),
            Self::Below { scheme, name } => write!(f, "{scheme}*{name}"),
        }
    }
}

fn origin() -> Value<OriginPattern> {
    let words = r#"an origin, such as "https://app.example.com", "https://*.example.com" or "*""#;
    Value::text(words, OriginPattern::parse, ToString::to_string)
}

fn any_name() -> Value<HeaderName> {
    Value::text("the name of a header", |text| HeaderName::from_bytes(text.as_bytes()).ok(), ToString::to_string)
}

fn allowed_header() -> Value<AllowedHeader> {
    let parse = |text: &str| match text {
        "*" => Some(AllowedHeader::Any),
        text => HeaderName::from_bytes(text.as_bytes()).ok().map(AllowedHeader::Named),
    };
    let show = |header: &AllowedHeader| match header {
        AllowedHeader::Any => "*".to_owned(),
        AllowedHeader::Named(name) => name.to_string(),
    };
    Value::text(r#"the name of a header, or "*""#, parse, show)
}

impl Cors {
    /// Whether every origin is allowed.
    pub fn allows_any_origin(&self) -> bool {
        self.allow_origins.contains(&OriginPattern::Any)
    }

    pub(super) fn check(&self, section: &Section<'_>) {
        if self.allow_origins.is_empty() {
            section.reject("allow_origins", "none", r#"at least one origin, or ["*"]"#);
        }
        if self.allows_any_origin() && self.allow_origins.len() > 1 {
            section.reject("allow_origins", r#""*" and other origins"#, r#""*" alone, or origins"#);
        }
        if self.allows_any_origin() && self.allow_credentials {
            section.reject(
                "allow_credentials",
                r#"true with allow_origins = ["*"]"#,
                "the origins that may use credentials",
            );
        }
        if self.expose_headers.contains(&header::SET_COOKIE) {
            section.reject("expose_headers", "set-cookie", "names of headers that pages may read at all");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_parsed_or_refused() {
        for text in ["*", "https://a.example", "http://localhost:5173", "https://*.a.example:8443", "http://[::1]:80"] {
            assert_eq!(OriginPattern::parse(text).expect(text).to_string(), text);
        }
        assert_eq!(OriginPattern::parse("HTTPS://A.example"), Some(OriginPattern::Exact("https://a.example".into())));
        for text in [
            "",
            "a.example",
            "https://",
            "https://a.example/",
            "https://a.example/path",
            "null",
            "https://a*.example",
            "**",
        ] {
            assert_eq!(OriginPattern::parse(text), None, "{text}");
        }
        for text in
            ["https://a.example:x", "https://a.example:080", "https://u@a.example", "https://*.[::1]", "https://*."]
        {
            assert_eq!(OriginPattern::parse(text), None, "{text}");
        }
    }

    #[test]
    fn patterns_match_whole_origins() {
        let matches = |pattern: &str, origin: &str| OriginPattern::parse(pattern).expect(pattern).matches(origin);
        for (pattern, origin) in [
            ("*", "null"),
            ("https://a.example", "https://a.example"),
            ("https://*.a.example", "https://x.a.example"),
            ("https://*.a.example", "https://y.x.a.example"),
            ("https://*.a.example:8443", "https://x.a.example:8443"),
        ] {
            assert!(matches(pattern, origin), "{pattern} {origin}");
        }
        for (pattern, origin) in [
            ("https://a.example", "http://a.example"),
            ("https://a.example", "https://a.example:8443"),
            ("https://a.example", "https://a.example.evil"),
            ("https://*.a.example", "https://a.example"),
            ("https://*.a.example", "https://xa.example"),
            ("https://*.a.example", "https://.a.example"),
            ("https://*.a.example", "https://evil/.a.example"),
            ("https://*.a.example", "https://evil#x.a.example"),
            ("https://*.a.example", "https://u@x.a.example"),
            ("https://*.a.example", "https://x.a.example:8443"),
        ] {
            assert!(!matches(pattern, origin), "{pattern} {origin}");
        }
    }
}
