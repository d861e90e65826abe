//! Translates a rule of an HTTPRoute to routes, one for each of its matches.

use std::time::Duration;

use http::{HeaderName, Method};
use serde_json::Value;

use super::{
    backend::Grants,
    filters::{FilterError, Filters},
    objects::{ApiObject, HttpMatch, HttpRule, RouteTimeouts, ValueMatch},
};
use crate::config::{
    HeaderCondition, PathPattern, QueryCondition, RefusedRoute, Route, TimeoutOverrides, is_target_path,
};

/// Longest timeout of the settings.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The route of one match, without hosts.
#[derive(Debug, Clone)]
pub(super) struct TranslatedMatch {
    pub(super) route: Route,
}

/// The routes of a rule. `port` is that of the listener.
pub(super) fn routes(
    of: &ApiObject,
    index: usize,
    rule: &Value,
    port: u16,
    grants: &mut Grants,
) -> Vec<TranslatedMatch> {
    let named = format!("{}, rule {index}", of.key());
    let unsupported = |what: &str| RefusedRoute::Unsupported(format!("{named}: {what}"));
    let rule: HttpRule = match serde_json::from_value(rule.clone()) {
        Ok(rule) => rule,
        // Nothing is known about what it matches.
        Err(error) => {
            let route = Route { refused: Some(unsupported(&error.to_string())), ..Route::default() };
            return vec![TranslatedMatch { route }];
        }
    };
    let matches = if rule.matches.is_empty() { vec![HttpMatch::default()] } else { rule.matches.clone() };
    let mut translated = Vec::with_capacity(matches.len());
    for one in &matches {
        let (conditions, not_implemented) = conditions(one);
        let mut route = match forwarding(of, &named, &rule, &conditions, port, grants) {
            Ok(route) => route,
            Err(why) => Route { refused: Some(unsupported(&why)), ..conditions },
        };
        if let Some(why) = not_implemented {
            route.refused = Some(unsupported(&why));
        }
        translated.push(TranslatedMatch { route });
    }
    translated
}

/// The conditions of a match, and what of it is not implemented. That part is then left out of the conditions, so that every
/// request that it could match is refused.
fn conditions(of: &HttpMatch) -> (Route, Option<String>) {
    let mut route = Route::default();
    let mut wrong = unknown("matches", &of.other);
    let mut note = |what: String| {
        wrong.get_or_insert(what);
    };
    match path(of.path.as_ref()) {
        Ok(path) => route.path = Some(path),
        Err(why) => note(why),
    }
    for header in &of.headers {
        let exact = is_exact(header);
        let Ok(name) = HeaderName::from_bytes(header.name.as_bytes()) else {
            note(format!("found the header name {:?}", header.name));
            continue;
        };
        // Of equivalent names the first one counts.
        if route.headers.iter().any(|known| known.name == name) {
            continue;
        }
        if !exact {
            note(format!("matches.headers of type {} are not implemented", kind(header)));
        }
        let value = Some(header.value.clone().unwrap_or_default()).filter(|_| exact);
        route.headers.push(HeaderCondition { name, value });
    }
    for parameter in &of.query_params {
        let exact = is_exact(parameter);
        if route.query.iter().any(|known| known.name == parameter.name) {
            continue;
        }
        if !exact {
            note(format!("matches.queryParams of type {} are not implemented", kind(parameter)));
        }
        let value = Some(parameter.value.clone().unwrap_or_default()).filter(|_| exact);
        route.query.push(QueryCondition { name: parameter.name.clone(), value });
    }
    if let Some(method) = &of.method {
        match Method::from_bytes(method.as_bytes()) {
            Ok(method) => route.methods.push(method),
            Err(_) => note(format!("found the method {method:?}")),
        }
    }
    (route, wrong)
}

fn kind(of: &ValueMatch) -> &str {
    of.kind.as_deref().unwrap_or("Exact")
}

fn is_exact(of: &ValueMatch) -> bool {
    kind(of) == "Exact"
}

fn path(of: Option<&ValueMatch>) -> Result<PathPattern, String> {
    let Some(of) = of else { return Ok(PathPattern::Prefix(String::new())) };
    let value = of.value.as_deref().unwrap_or("/");
    if !value.starts_with('/') {
        return Err(format!("found the path {value:?}, expected one that starts with \"/\""));
    }
    match of.kind.as_deref().unwrap_or("PathPrefix") {
        "Exact" => Ok(PathPattern::Exact(value.to_owned())),
        "PathPrefix" => Ok(PathPattern::Prefix(value.trim_end_matches('/').to_owned())),
        other => Err(format!("matches.path of type {other} is not implemented")),
    }
}

/// The route with filters, timeouts and backends. The error says what is not implemented.
fn forwarding(
    of: &ApiObject,
    named: &str,
    rule: &HttpRule,
    conditions: &Route,
    port: u16,
    grants: &mut Grants,
) -> Result<Route, String> {
    if let Some(why) = unknown("rules", &rule.other) {
        return Err(why);
    }
    let filters = Filters::new(&rule.filters, conditions.path.as_ref(), port);
    let Filters { request_headers, rewrite, redirect } = filters.map_err(|error| match error {
        FilterError::Unsupported(why) | FilterError::Incompatible(why) => why,
    })?;
    let timeouts = timeouts(&rule.timeouts)?;
    let conditions = Route { timeouts, request_headers, rewrite, ..conditions.clone() };
    if redirect.is_some() {
        return Ok(Route { redirect, ..conditions });
    }
    let pools: Vec<_> = rule.backend_refs.iter().map(|backend| grants.share(of, named, backend)).collect();
    let backend = |why: &str| Some(RefusedRoute::Backend(format!("{named}: {why}")));
    let refused = if pools.is_empty() {
        backend("has no backendRefs")
    } else if pools.iter().all(|share| share.weight == 0) {
        backend("no weight of its backendRefs is above 0")
    } else {
        None
    };
    Ok(Route { pools, refused, ..conditions })
}

/// The first field that nothing reads.
pub(super) fn unknown(of: &str, other: &serde_json::Map<String, Value>) -> Option<String> {
    other.keys().next().map(|key| format!("{of}.{key} is not implemented"))
}

fn timeouts(of: &RouteTimeouts) -> Result<TimeoutOverrides, String> {
    if let Some(why) = unknown("timeouts", &of.other) {
        return Err(why);
    }
    let read = |text: &Option<String>| text.as_deref().map(duration).transpose();
    Ok(TimeoutOverrides { request: read(&of.request)?, dispatch: read(&of.backend_request)?, ..Default::default() })
}

/// A duration of the Gateway API (GEP-2257): up to four numbers with their units. 0 means no timeout.
fn duration(text: &str) -> Result<Option<Duration>, String> {
    let wrong = || format!("found the timeout {text:?}, expected a duration such as \"1m30s\"");
    let (mut rest, mut total, mut parts) = (text, Duration::ZERO, 0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
        let milliseconds = match &rest[..letters] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        parts += 1;
        if digits > 5 || parts > 4 {
            return Err(wrong());
        }
        total += Duration::from_millis(number * milliseconds);
    }
    match total {
        _ if parts == 0 => Err(wrong()),
        Duration::ZERO => Ok(None),
        total => Ok(Some(total.min(LONGEST))),
    }
}

/// Whether a path that a filter sets can be sent.
pub(super) fn is_path(path: &str) -> bool {
    is_target_path(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_of_the_gateway_api_are_read() {
        let seconds = |seconds| Ok(Some(Duration::from_secs(seconds)));
        let cases = [
            ("10s", seconds(10)),
            ("1h2m3s", seconds(3723)),
            ("500ms", Ok(Some(Duration::from_millis(500)))),
            ("0s", Ok(None)),
            ("0h0ms", Ok(None)),
            ("99999h", Ok(Some(LONGEST))),
        ];
        for (text, expected) in cases {
            assert_eq!(duration(text), expected, "{text}");
        }
        for text in ["", "10", "s", "1.5s", "-1s", "1S", "1d", "100000s", "1h1m1s1ms1ms", "1s ", "1\u{e9}"] {
            assert!(duration(text).is_err_and(|error| error.contains("expected a duration")), "{text}");
        }
    }
}
