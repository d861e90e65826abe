//! Kinds of single values: each converts TOML to the type of a setting, or says what was expected.
//!
//! A [`Value`] holds the description, the JSON Schema and the parser of one kind, so that the three cannot differ. Kinds that
//! several sections use are here; others are in the file of their section.

use std::{borrow::Cow, fmt::Display, net::SocketAddr, ops::RangeInclusive, time::Duration};

use http::{
    HeaderName, Method, header,
    uri::{Authority, PathAndQuery},
};
use serde_json::{Value as Json, json};
use toml::de::DeValue;

use super::{
    document::Section,
    settings::{KeyValues, SettingKey, SettingKind, Shape, paragraphs},
};

pub(super) use super::paths::{file, folder, required_file};

/// Completes "expected …".
pub(super) struct Expected(pub(super) Cow<'static, str>);

pub(super) type Parsed<T> = Result<T, Expected>;

type Parse<T> = Box<dyn Fn(&DeValue<'_>) -> Option<T>>;

/// One value.
pub(super) struct Value<T> {
    words: Cow<'static, str>,
    choices: Vec<(&'static str, String)>,
    schema: Json,
    parse: Parse<T>,
    show: Box<dyn Fn(&T) -> Json>,
}

impl<T: 'static> Value<T> {
    /// `words` completes "expected …"; `show` is the inverse of `parse`.
    pub(super) fn new(
        words: impl Into<Cow<'static, str>>,
        schema: Json,
        parse: impl Fn(&DeValue<'_>) -> Option<T> + 'static,
        show: impl Fn(&T) -> Json + 'static,
    ) -> Self {
        let (parse, show) = (Box::new(parse), Box::new(show));
        Self { words: words.into(), choices: Vec::new(), schema, parse, show }
    }

    /// A value that is a string.
    pub(super) fn text(
        words: impl Into<Cow<'static, str>>,
        parse: impl Fn(&str) -> Option<T> + 'static,
        show: impl Fn(&T) -> String + 'static,
    ) -> Self {
        Self::new(
            words,
            json!({ "type": "string" }),
            move |value| text(value).and_then(&parse),
            move |value| show(value).into(),
        )
    }

    pub(super) fn schema(mut self, schema: Json) -> Self {
        self.schema = schema;
        self
    }

    pub(super) fn parse(&self, value: &DeValue<'_>) -> Parsed<T> {
        (self.parse)(value).ok_or_else(|| Expected(self.words.clone()))
    }

    /// Accepts `"off"` as `None`.
    pub(super) fn or_off(self) -> Value<Option<T>> {
        let Self { words, schema, parse, show, .. } = self;
        let off = json!({ "const": "off" });
        Value::new(
            format!(r#""off" or {words}"#),
            json!({ "anyOf": [off, schema] }),
            move |value| if text(value) == Some("off") { Some(None) } else { parse(value).map(Some) },
            move |value| value.as_ref().map_or("off".into(), &show),
        )
    }

    /// `None` if the file does not set the key.
    pub(super) fn optional(self, example: impl Into<Json>) -> Optional<T> {
        Optional { value: self, example: example.into() }
    }

    /// An error if the file does not set the key; `words` name what is missing.
    pub(super) fn required(self, words: &'static str, example: impl Into<Json>) -> Required<T> {
        Required { value: self, words, example: example.into() }
    }

    /// An array. `words` describe it in the error about any other value.
    pub(super) fn list(self, words: &'static str) -> List<T> {
        List { element: self, words }
    }

    /// One value or a non-empty array.
    pub(super) fn one_or_more(self) -> OneOrMore<T> {
        OneOrMore(self)
    }

    fn shape(&self, default: Option<Json>) -> Shape {
        let (words, choices) = (self.words.to_string(), self.choices.clone());
        Shape::Value { words, choices, schema: self.schema.clone(), default, example: None }
    }
}

/// A key with a value.
fn key(name: &'static str, doc: &[&'static str], shape: Shape) -> SettingKey {
    SettingKey { name, old_name: None, doc: paragraphs(doc), shape, is_set: true, required: false }
}

impl<T: 'static> SettingKind for Value<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<T> {
        section.read(key, |value| self.parse(value))
    }

    fn put(&self, name: &'static str, value: &T, keys: &mut KeyValues) {
        keys.insert(name.to_owned(), (self.show)(value));
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], default: &T) -> Vec<SettingKey> {
        vec![key(name, doc, self.shape(Some((self.show)(default))))]
    }
}

pub(super) struct Optional<T> {
    value: Value<T>,
    example: Json,
}

impl<T: 'static> SettingKind for Optional<T> {
    type Value = Option<T>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Option<T>> {
        Some(self.value.read(section, key))
    }

    fn put(&self, name: &'static str, value: &Option<T>, keys: &mut KeyValues) {
        value.iter().for_each(|value| self.value.put(name, value, keys));
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &Option<T>) -> Vec<SettingKey> {
        let shape = with_example(self.value.shape(None), &self.example);
        vec![SettingKey { is_set: false, ..key(name, doc, shape) }]
    }
}

pub(super) struct Required<T> {
    value: Value<T>,
    words: &'static str,
    example: Json,
}

impl<T: 'static> SettingKind for Required<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<T> {
        section.require(key, self.words, |value| self.value.parse(value))
    }

    fn put(&self, name: &'static str, value: &T, keys: &mut KeyValues) {
        self.value.put(name, value, keys);
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &T) -> Vec<SettingKey> {
        let shape = with_example(self.value.shape(None), &self.example);
        vec![SettingKey { required: true, ..key(name, doc, shape) }]
    }
}

fn with_example(shape: Shape, json: &Json) -> Shape {
    match shape {
        Shape::Value { words, choices, schema, default, .. } => {
            Shape::Value { words, choices, schema, default, example: Some(json.clone()) }
        }
        other => other,
    }
}

pub(super) struct List<T> {
    element: Value<T>,
    words: &'static str,
}

impl<T: 'static> SettingKind for List<T> {
    type Value = Vec<T>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Vec<T>> {
        let is_given = section.has(key);
        let listed = section.list(key, self.words, |value| self.element.parse(value));
        is_given.then_some(listed)
    }

    fn put(&self, name: &'static str, value: &Vec<T>, keys: &mut KeyValues) {
        keys.insert(name.to_owned(), value.iter().map(&self.element.show).collect());
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], default: &Vec<T>) -> Vec<SettingKey> {
        let default = default.iter().map(&self.element.show).collect();
        let shape = Shape::Value {
            words: self.words.to_owned(),
            choices: self.element.choices.clone(),
            schema: json!({ "type": "array", "items": self.element.schema }),
            default: Some(default),
            example: None,
        };
        vec![key(name, doc, shape)]
    }
}

/// Empty if the file does not set the key.
pub(super) struct OneOrMore<T>(Value<T>);

impl<T: 'static> SettingKind for OneOrMore<T> {
    type Value = Vec<T>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Vec<T>> {
        Some(section.one_or_more(key, |value| self.0.parse(value)))
    }

    fn put(&self, name: &'static str, value: &Vec<T>, keys: &mut KeyValues) {
        if !value.is_empty() {
            keys.insert(name.to_owned(), value.iter().map(&self.0.show).collect());
        }
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &Vec<T>) -> Vec<SettingKey> {
        let array = json!({ "type": "array", "items": self.0.schema, "minItems": 1 });
        let shape = Shape::Value {
            words: format!("{}, or an array of them", self.0.words),
            choices: self.0.choices.clone(),
            schema: json!({ "anyOf": [self.0.schema, array] }),
            default: None,
            example: None,
        };
        vec![SettingKey { is_set: false, ..key(name, doc, shape) }]
    }
}

/// A value that is read by a function, which may also read other keys.
pub(super) struct Custom<T> {
    pub(super) words: &'static str,
    pub(super) schema: Json,
    pub(super) read: fn(&mut Section<'_>, &'static str) -> Option<T>,
    /// Formats a value; `None` if the key is absent then.
    pub(super) show: fn(&T) -> Option<Json>,
}

impl<T> SettingKind for Custom<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<T> {
        (self.read)(section, key)
    }

    fn put(&self, name: &'static str, value: &T, keys: &mut KeyValues) {
        keys.extend((self.show)(value).map(|value| (name.to_owned(), value)));
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], default: &T) -> Vec<SettingKey> {
        let (words, schema, default) = (self.words.to_owned(), self.schema.clone(), (self.show)(default));
        let is_set = default.is_some();
        let shape = Shape::Value { words, choices: Vec::new(), schema, default, example: None };
        vec![SettingKey { is_set, ..key(name, doc, shape) }]
    }
}

/// An enum with named values, declared by `choice!`.
pub(super) trait Choice: Copy + PartialEq + 'static {
    /// Name, value and documentation lines of each.
    const ALL: &'static [(&'static str, Self, &'static [&'static str])];
}

/// One of the names of `C`.
pub(super) fn choice<C: Choice>() -> Value<C> {
    let names: Vec<String> = C::ALL.iter().map(|(name, ..)| format!("{name:?}")).collect();
    let choices: Vec<_> = C::ALL.iter().map(|(name, _, doc)| (*name, paragraphs(doc).join(" "))).collect();
    let named = |(name, meaning): &(&'static str, String)| json!({ "const": name, "description": meaning });
    let schema = json!({ "oneOf": choices.iter().map(named).collect::<Vec<_>>() });
    let parse = |text: &str| C::ALL.iter().find(|(name, ..)| *name == text).map(|(_, choice, _)| *choice);
    let show =
        |choice: &C| C::ALL.iter().find(|(_, other, _)| other == choice).map_or("", |(name, ..)| *name).to_owned();
    Value { choices, ..Value::text(names.join(" or "), parse, show).schema(schema) }
}

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

pub(super) fn text<'v>(value: &'v DeValue<'_>) -> Option<&'v str> {
    match value {
        DeValue::String(text) => Some(text),
        _ => None,
    }
}

pub(super) fn integer<T>(range: RangeInclusive<T>) -> Value<T>
where
    T: TryFrom<u64> + PartialOrd + Display + Copy + Into<WideInteger> + 'static,
{
    let (least, most) = (*range.start(), *range.end());
    let schema = json!({ "type": "integer", "minimum": least.into().0, "maximum": most.into().0 });
    let parse = move |value: &DeValue<'_>| {
        let number = match value {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        number.and_then(|number| T::try_from(number).ok()).filter(|number| range.contains(number))
    };
    Value::new(format!("an integer from {least} to {most}"), schema, parse, |&number: &T| number.into().0.into())
}

/// An integer of any width.
pub(super) struct WideInteger(u64);

impl From<u16> for WideInteger {
    fn from(number: u16) -> Self {
        Self(number.into())
    }
}

impl From<u32> for WideInteger {
    fn from(number: u32) -> Self {
        Self(number.into())
    }
}

impl From<u64> for WideInteger {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl From<usize> for WideInteger {
    fn from(number: usize) -> Self {
        Self(number as u64)
    }
}

pub(super) fn boolean() -> Value<bool> {
    let parse = |value: &DeValue<'_>| if let DeValue::Boolean(flag) = value { Some(*flag) } else { None };
    Value::new("true or false", json!({ "type": "boolean" }), parse, |&flag| flag.into())
}

const DAY: Duration = Duration::from_secs(24 * 3600);
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A duration of more than zero and at most a day.
pub(super) fn duration() -> Value<Duration> {
    let words = r#"a duration such as "250ms", "4s", "5m" or "1h", from 1ms to 24h"#;
    Value::text(words, parse_duration, show_duration)
        .schema(json!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h)$" }))
}

pub(super) fn duration_or_off() -> Value<Option<Duration>> {
    duration().or_off()
}

/// As [`duration_or_off`], but at least a second, for timeouts that the kernel counts in seconds.
pub(super) fn seconds_or_off() -> Value<Option<Duration>> {
    let words = r#"a duration such as "4s", "5m" or "1h", from 1s to 24h"#;
    let parse = |text: &str| parse_duration(text).filter(|duration| *duration >= Duration::from_secs(1));
    Value::text(words, parse, show_duration)
        .schema(json!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h)$" }))
        .or_off()
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, milliseconds) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    let duration = Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(milliseconds)?);
    (!duration.is_zero() && duration <= DAY).then_some(duration)
}

/// Formats a duration in the largest unit of which it is a multiple.
fn show_duration(duration: &Duration) -> String {
    let milliseconds = duration.as_millis() as u64;
    let fits = |(_, unit): &(&str, u64)| milliseconds.is_multiple_of(*unit);
    UNITS.into_iter().find(fits).map_or_else(String::new, |(name, unit)| format!("{}{name}", milliseconds / unit))
}

/// An address to listen on; port 0 lets the kernel choose.
pub(super) fn listen_address() -> Value<SocketAddr> {
    let words = r#"ip:port, such as "0.0.0.0:8080" or "[::]:8080""#;
    Value::text(words, |text| text.parse().ok(), ToString::to_string)
}

pub(super) const ENDPOINT: &str = r#"ip:port of a server, such as "10.0.0.7:8000" or "[fd00::7]:8000""#;

/// An address to connect to.
pub(super) fn endpoint() -> Value<SocketAddr> {
    let can_be_dialled = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
    Value::text(ENDPOINT, move |text| text.parse().ok().filter(can_be_dialled), ToString::to_string)
}

/// A host name or IP address, with a port.
pub(super) fn is_host_port(text: &str) -> bool {
    text.parse::<Authority>().is_ok_and(|authority| {
        !authority.host().is_empty() && !text.contains('@') && authority.port_u16().is_some_and(|port| port != 0)
    })
}

/// A host without port.
pub(super) fn host() -> Value<String> {
    string(r#"a host without port, such as "llm.example.com""#, is_host)
}

pub(super) fn is_host(text: &str) -> bool {
    text.parse::<Authority>().is_ok_and(|authority| authority.host() == text) && !text.contains('*')
}

/// A name that needs no escaping in metric labels and log lines.
pub(super) fn pool_name() -> Value<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    let is_name = move |text: &str| (1..=253).contains(&text.len()) && text.bytes().all(is_allowed);
    string("1 to 253 letters, digits or any of . _ - /", is_name)
        .schema(json!({ "type": "string", "pattern": "^[A-Za-z0-9._/-]{1,253}$" }))
}

pub(super) fn non_empty() -> Value<String> {
    string("a string that is not empty", |text| !text.is_empty()).schema(json!({ "type": "string", "minLength": 1 }))
}

/// A string for which `holds` returns true.
pub(super) fn string(words: &'static str, holds: impl Fn(&str) -> bool + 'static) -> Value<String> {
    Value::text(words, move |text| holds(text).then(|| text.to_owned()), Clone::clone)
}

/// A request target without a host.
pub(super) fn path_and_query() -> Value<PathAndQuery> {
    let parse = |text: &str| Some(text).filter(|text| text.starts_with('/') && !text.contains('#'))?.parse().ok();
    Value::text(r#"a path that starts with "/""#, parse, ToString::to_string)
}

/// A method for which `holds` returns true.
pub(super) fn method(holds: fn(&Method) -> bool) -> Value<Method> {
    let parse = move |text: &str| {
        let method = Method::from_bytes(text.as_bytes()).ok()?;
        Some(method).filter(|method| holds(method) && !text.contains(char::is_lowercase))
    };
    Value::text(r#"a method in capital letters, such as "POST""#, parse, ToString::to_string)
}

/// A header that the configuration may name: not one that frames the message or belongs to the connection.
pub(super) fn header_name() -> Value<HeaderName> {
    let parse = |text: &str| HeaderName::from_bytes(text.as_bytes()).ok().filter(may_be_changed);
    Value::text("the name of a header that does not frame the message", parse, ToString::to_string)
}

/// Whether the header neither frames the message nor belongs to the connection.
pub fn may_be_changed(name: &HeaderName) -> bool {
    const RESERVED: [HeaderName; 9] = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::EXPECT,
        // Without it, requests could go round in circles.
        HeaderName::from_static("x-penstock-hop"),
    ];
    !RESERVED.contains(name)
}
