//! Single values: from TOML to the type of a setting, or what would have been right in words.
//!
//! Each parser is a function of the value alone. Ranges are part of a parser, so that the words and the check cannot differ.

use std::{borrow::Cow, fmt::Display, net::SocketAddr, ops::RangeInclusive, time::Duration};

use http::{
    HeaderName, HeaderValue, header,
    uri::{Authority, PathAndQuery},
};
use toml::de::DeValue;

use super::{Pin, Ratio};

/// Completes "expected …".
pub(super) struct Expected(pub(super) Cow<'static, str>);

pub(super) type Parsed<T> = Result<T, Expected>;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Completes "found …".
pub(super) fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

pub(super) fn integer<T>(range: RangeInclusive<T>) -> impl Fn(&DeValue<'_>) -> Parsed<T>
where
    T: TryFrom<u64> + PartialOrd + Display,
{
    move |value| {
        let number = match value {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        let number = number.and_then(|number| T::try_from(number).ok()).filter(|number| range.contains(number));
        number.ok_or_else(|| Expected(format!("an integer from {} to {}", range.start(), range.end()).into()))
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Parsed<bool> {
    match value {
        DeValue::Boolean(flag) => Ok(*flag),
        _ => Err(Expected("true or false".into())),
    }
}

/// More than zero, up to a day.
pub(super) fn duration(value: &DeValue<'_>) -> Parsed<Duration> {
    text(value)
        .and_then(parse_duration)
        .ok_or(Expected(r#"a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#.into()))
}

/// As [`duration`], or `off`.
pub(super) fn duration_or_off(value: &DeValue<'_>) -> Parsed<Option<Duration>> {
    if text(value) == Some("off") {
        return Ok(None);
    }
    duration(value).map(Some).map_err(|Expected(duration)| Expected(format!(r#""off" or {duration}"#).into()))
}

/// As [`duration_or_off`], and not below a second: what the kernel counts in seconds.
pub(super) fn seconds_or_off(value: &DeValue<'_>) -> Parsed<Option<Duration>> {
    let duration = duration_or_off(value).ok().filter(|duration| duration.is_none_or(|d| d >= Duration::from_secs(1)));
    duration.ok_or(Expected(r#""off" or a duration such as "4s", "5m" or "1h", from 1s to 24h"#.into()))
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    let duration = Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(milliseconds)?);
    (!duration.is_zero() && duration <= DAY).then_some(duration)
}

/// An address to listen on; port 0 lets the kernel choose.
pub(super) fn listen_address(value: &DeValue<'_>) -> Parsed<SocketAddr> {
    let address = text(value).and_then(|text| text.parse().ok());
    address.ok_or(Expected(r#"ip:port, such as "0.0.0.0:8080" or "[::]:8080""#.into()))
}

/// An address to connect to.
pub(super) fn endpoint(value: &DeValue<'_>) -> Parsed<SocketAddr> {
    let address = text(value).and_then(|text| text.parse::<SocketAddr>().ok());
    let address = address.filter(|address| address.port() != 0 && !address.ip().is_unspecified());
    address.ok_or_else(not_an_endpoint)
}

pub(super) fn not_an_endpoint() -> Expected {
    Expected(r#"ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#.into())
}

/// A name or address, and a port.
pub(super) fn host_port(value: &DeValue<'_>) -> Parsed<String> {
    let is_host_port = |text: &&str| {
        text.parse::<Authority>().is_ok_and(|authority| {
            !authority.host().is_empty() && !text.contains('@') && authority.port_u16().is_some_and(|port| port != 0)
        })
    };
    let address = text(value).filter(is_host_port);
    address.map(str::to_owned).ok_or(Expected(r#"host:port, such as "epp.default.svc:9002""#.into()))
}

/// A host without port.
pub(super) fn host(value: &DeValue<'_>) -> Parsed<String> {
    let is_host =
        |text: &&str| text.parse::<Authority>().is_ok_and(|authority| authority.host() == *text) && !text.contains('*');
    let host = text(value).filter(is_host);
    host.map(str::to_owned).ok_or(Expected(r#"a host without port, such as "llm.example.com""#.into()))
}

/// `http://host:port`: the collector is on this node or next to it.
pub(super) fn http_url_or_off(value: &DeValue<'_>) -> Parsed<Option<String>> {
    let expected = || Expected(r#""off" or a URL such as "http://127.0.0.1:4317""#.into());
    match text(value).ok_or_else(expected)? {
        "off" => Ok(None),
        url => {
            let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')).unwrap_or_default();
            let is_host = |authority: &Authority| !authority.host().is_empty() && !authority.as_str().contains('@');
            authority.parse().ok().filter(is_host).map(|_| Some(url.to_owned())).ok_or_else(expected)
        }
    }
}

/// RFC 9110 §7.6.3: a pseudonym, or a host with an optional port.
pub(super) fn via_or_off(value: &DeValue<'_>) -> Parsed<Option<String>> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:[]".contains(&byte);
    match text(value).filter(|text| !text.is_empty() && text.bytes().all(allowed)) {
        Some("off") => Ok(None),
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(Expected(r#""off" or a name without blanks, such as "penstock""#.into())),
    }
}

pub(super) fn ratio(value: &DeValue<'_>) -> Parsed<Ratio> {
    let number = match value {
        DeValue::Float(number) => number.as_str().parse().ok(),
        DeValue::Integer(number) => number.as_str().parse().ok(),
        _ => None,
    };
    number.and_then(Ratio::new).ok_or(Expected("a number from 0 to 1".into()))
}

pub(super) fn path_prefix(value: &DeValue<'_>) -> Parsed<String> {
    let path = text(value).filter(|text| text.starts_with('/') && !text.contains(['?', '#', ' ']));
    path.map(str::to_owned).ok_or(Expected(r#"a path that starts with "/", without query"#.into()))
}

/// What a request may ask for.
pub(super) fn path_and_query(value: &DeValue<'_>) -> Parsed<PathAndQuery> {
    let path = text(value).filter(|text| text.starts_with('/') && !text.contains('#'));
    path.and_then(|path| path.parse().ok()).ok_or(Expected(r#"a path that starts with "/""#.into()))
}

/// What a metric label and a log line carry unescaped.
pub(super) fn pool_name(value: &DeValue<'_>) -> Parsed<String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    let name = text(value).filter(|text| (1..=253).contains(&text.len()) && text.bytes().all(allowed));
    name.map(str::to_owned).ok_or(Expected("1 to 253 letters, digits or any of . _ - /".into()))
}

/// A token (RFC 9110 §5.6.2), and not the upgrade that hides requests.
pub(super) fn upgrade(value: &DeValue<'_>) -> Parsed<String> {
    let name =
        text(value).filter(|text| HeaderName::from_bytes(text.as_bytes()).is_ok() && !text.eq_ignore_ascii_case("h2c"));
    name.map(str::to_owned).ok_or(Expected(r#"the name of a protocol other than "h2c", such as "websocket""#.into()))
}

pub(super) fn non_empty(value: &DeValue<'_>) -> Parsed<String> {
    let text = text(value).filter(|text| !text.is_empty());
    text.map(str::to_owned).ok_or(Expected("a text that is not empty".into()))
}

/// The SHA-256 of a public key.
pub(super) fn pin(value: &DeValue<'_>) -> Parsed<Pin> {
    let pin = text(value).filter(|text| text.len() == 64).and_then(|text| {
        let mut pin = [0; 32];
        for (byte, digits) in pin.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digit = |at: usize| char::from(digits[at]).to_digit(16).map(|digit| digit as u8);
            *byte = digit(0)? << 4 | digit(1)?;
        }
        Some(Pin(pin))
    });
    pin.ok_or(Expected("the SHA-256 of a public key, 64 hexadecimal digits".into()))
}

/// A header that the agent may set: those that frame the message or belong to the connection are its own.
pub(super) fn header_name(value: &DeValue<'_>) -> Parsed<HeaderName> {
    const RESERVED: [HeaderName; 8] = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::EXPECT,
    ];
    let name = text(value).and_then(|text| HeaderName::from_bytes(text.as_bytes()).ok());
    let name = name.filter(|name| !RESERVED.contains(name));
    name.ok_or(Expected("the name of a header that does not frame the message".into()))
}

/// A header to look at.
pub(super) fn any_header_name(value: &DeValue<'_>) -> Parsed<HeaderName> {
    let name = text(value).and_then(|text| HeaderName::from_bytes(text.as_bytes()).ok());
    name.ok_or(Expected("the name of a header".into()))
}

/// As it is once blanks around it are gone.
pub(super) fn header_value(value: &DeValue<'_>) -> Parsed<String> {
    let value = text(value).filter(|text| text.trim() == *text && HeaderValue::from_str(text).is_ok());
    value.map(str::to_owned).ok_or(Expected("a header's value, without blanks around it".into()))
}

pub(super) fn one_of<T: Copy>(choices: &'static [(&'static str, T)]) -> impl Fn(&DeValue<'_>) -> Parsed<T> {
    move |value| {
        let choice = text(value).and_then(|text| choices.iter().find(|(name, _)| *name == text));
        choice.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
            Expected(names.join(" or ").into())
        })
    }
}

fn text<'v>(value: &'v DeValue<'_>) -> Option<&'v str> {
    match value {
        DeValue::String(text) => Some(text),
        _ => None,
    }
}
