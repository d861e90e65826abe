//! `[pools.retry]`: when a request that an endpoint took and did not answer goes to the next one.

use http::Method;
use toml::de::DeValue;

use super::{
    Retry,
    document::Section,
    value::{self, Expected, Parsed},
};

pub(super) fn retry(section: &mut Section<'_>) -> Retry {
    let default = Retry::default();
    Retry {
        attempts: section.read("attempts", value::integer(0..=10)).unwrap_or(default.attempts),
        methods: methods(section).unwrap_or(default.methods),
        budget_percent: section.read("budget_percent", value::integer(0..=100)).unwrap_or(default.budget_percent),
        budget_min_per_second: section
            .read("budget_min_per_second", value::integer(0..=100_000))
            .unwrap_or(default.budget_min_per_second),
    }
}

fn methods(section: &mut Section<'_>) -> Option<Vec<Method>> {
    let given = section.has("methods");
    let listed = section.list("methods", "an array of methods", method);
    given.then_some(listed)
}

fn method(value: &DeValue<'_>) -> Parsed<Method> {
    let method = if let DeValue::String(text) = value { Method::from_bytes(text.as_bytes()).ok() } else { None };
    let method =
        method.filter(|method| *method != Method::CONNECT && !method.as_str().contains(|c: char| c.is_lowercase()));
    method.ok_or(Expected(r#"a method in capital letters, such as "POST""#.into()))
}
