//! `[[routes]]`: which requests go to which pools. A route that no request can reach is an error.

use http::Method;
use toml::de::DeValue;

use super::{
    Bbr, HeaderCondition, HostPattern, ModelPattern, PathPattern, Pool, Route, WeightedPool,
    document::Section,
    timeouts,
    value::{self, Expected, Parsed},
};

/// As the Gateway API has it.
const MAX_WEIGHT: u32 = 1_000_000;

pub(super) fn routes(root: &mut Section<'_>, pools: &[Pool], bbr: &Bbr) -> Vec<Route> {
    let mut earlier: Vec<Route> = Vec::new();
    root.sections("routes", |section| {
        let route = Route {
            hosts: section.one_or_more("host", host),
            path: path(section),
            methods: section.one_or_more("method", method),
            headers: headers(section),
            models: section.one_or_more("model", model),
            base_models: section.one_or_more("base_model", value::non_empty),
            pools: weighted(section, pools),
            timeouts: section.section("timeouts", timeouts::overrides),
        };
        check_names(section, &route, bbr);
        if let Some(index) = earlier.iter().position(|earlier| covers(earlier, &route)) {
            let key = if section.has("pools") { "pools" } else { "pool" };
            let found = format_args!("a route that routes[{index}] always wins over");
            section.reject(key, found, "the narrower route first");
        }
        earlier.push(route);
    });
    earlier
}

fn host(value: &DeValue<'_>) -> Parsed<HostPattern> {
    const EXPECTED: &str = r#"a host without port, such as "llm.example.com" or "*.example.com""#;
    let expected = || Expected(EXPECTED.into());
    let normal = |host: &str| host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    match value {
        DeValue::String(text) if text.starts_with("*.") => {
            let below = DeValue::String(text[2..].into());
            let below = value::host(&below).map_err(|_| expected())?;
            // An address has no names below it.
            let is_name = !below.starts_with('[') && below.parse::<std::net::Ipv4Addr>().is_err();
            if is_name { Ok(HostPattern::Below(format!(".{}", normal(&below)))) } else { Err(expected()) }
        }
        _ => value::host(value).map(|host| HostPattern::Exact(normal(&host))).map_err(|_| expected()),
    }
}

fn path(section: &mut Section<'_>) -> Option<PathPattern> {
    let exact = section.read("path", value::path_prefix).map(PathPattern::Exact);
    let prefix = section.read("path_prefix", value::path_prefix);
    if section.has("path") && section.has("path_prefix") {
        section.reject("path_prefix", "a second condition on the path", "path or path_prefix");
    }
    exact.or_else(|| prefix.map(|prefix| PathPattern::Prefix(prefix.trim_end_matches('/').to_owned())))
}

/// Those that go through the agent: CONNECT and TRACE do not.
fn method(value: &DeValue<'_>) -> Parsed<Method> {
    let method = if let DeValue::String(text) = value { Method::from_bytes(text.as_bytes()).ok() } else { None };
    let method = method.filter(|method| {
        !matches!(*method, Method::CONNECT | Method::TRACE) && !method.as_str().contains(|c: char| c.is_lowercase())
    });
    method.ok_or(Expected(r#"a method in capital letters, such as "POST""#.into()))
}

fn headers(section: &mut Section<'_>) -> Vec<HeaderCondition> {
    let expected = r#"an array of { name = "x-team", value = "red" }, value optional"#;
    let conditions = section.tables("headers", expected, |section| {
        let name = section.require("name", "the name of a header", value::any_header_name);
        let value = section.read("value", value::header_value);
        name.map(|name| HeaderCondition { name, value })
    });
    conditions.into_iter().flatten().collect()
}

fn model(value: &DeValue<'_>) -> Parsed<ModelPattern> {
    let name = value::non_empty(value)?;
    Ok(match name.strip_suffix('*') {
        Some(prefix) => ModelPattern::Prefix(prefix.to_owned()),
        None => ModelPattern::Exact(name),
    })
}

fn weighted(section: &mut Section<'_>, pools: &[Pool]) -> Vec<WeightedPool> {
    let one_of = || {
        let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
        format!("one of {}", names.join(", "))
    };
    let exists = |name: &str| pools.iter().any(|pool| pool.name == name);
    let only = section.read("pool", value::pool_name);
    let mut shares: Vec<WeightedPool> = Vec::new();
    section.tables("pools", r#"an array of { name = "a", weight = 70 }"#, |section| {
        let name = section.require("name", "the name of a pool", value::pool_name).unwrap_or_default();
        let weight = section.read("weight", value::integer(0..=MAX_WEIGHT)).unwrap_or(1);
        if !exists(&name) {
            section.reject("name", format_args!("{name:?}"), one_of());
        } else if shares.iter().any(|share| share.name == name) {
            section.reject("name", format_args!("{name:?} again"), "each pool once");
        }
        shares.push(WeightedPool { name, weight });
    });
    match (only, section.has("pools")) {
        (None, false) => section.reject("pool", "nothing", "the name of a pool, or pools"),
        (Some(_), true) => section.reject("pool", "a pool beside pools", "pool or pools"),
        (Some(name), false) => {
            if !exists(&name) {
                section.reject("pool", format_args!("{name:?}"), one_of());
            }
            shares.push(WeightedPool::new(name, 1));
        }
        (None, true) if shares.iter().all(|share| share.weight == 0) => {
            section.reject("pools", "no weight above 0", "at least one");
        }
        (None, true) => {}
    }
    shares
}

/// What a route asks of a body must be looked for in it.
fn check_names(section: &Section<'_>, route: &Route, bbr: &Bbr) {
    if !bbr.enabled {
        for key in ["model", "base_model"].into_iter().filter(|key| section.has(key)) {
            section.reject(key, "a condition that never holds", "bbr.enabled = true");
        }
    }
    for base in &route.base_models {
        if !bbr.base_models.values().any(|known| known == base) {
            section.reject("base_model", format_args!("{base:?}"), "a base model of bbr.base_models");
        }
    }
}

/// Whether every request that `later` is for already belongs to `earlier`.
fn covers(earlier: &Route, later: &Route) -> bool {
    any_covers(&earlier.hosts, &later.hosts, HostPattern::covers)
        && earlier.path.as_ref().is_none_or(|path| later.path.as_ref().is_some_and(|later| path.covers(later)))
        && any_covers(&earlier.methods, &later.methods, PartialEq::eq)
        && earlier.headers.iter().all(|header| later.headers.iter().any(|later| header.covers(later)))
        && any_covers(&earlier.models, &later.models, ModelPattern::covers)
        && any_covers(&earlier.base_models, &later.base_models, PartialEq::eq)
}

/// Of alternatives, none of which is no condition.
fn any_covers<T>(earlier: &[T], later: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
    earlier.is_empty()
        || !later.is_empty() && later.iter().all(|later| earlier.iter().any(|earlier| covers(earlier, later)))
}

impl HostPattern {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(host), Self::Exact(other)) => host == other,
            (Self::Exact(_), Self::Below(_)) => false,
            (Self::Below(below), Self::Exact(other)) => other.len() > below.len() && other.ends_with(below),
            (Self::Below(below), Self::Below(other)) => other.ends_with(below),
        }
    }
}

impl PathPattern {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(path), Self::Exact(other)) => path == other,
            (Self::Exact(_), Self::Prefix(_)) => false,
            (Self::Prefix(prefix), Self::Exact(other) | Self::Prefix(other)) => {
                other.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl HeaderCondition {
    fn covers(&self, other: &Self) -> bool {
        self.name == other.name && (self.value.is_none() || self.value == other.value)
    }
}

impl ModelPattern {
    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(model), Self::Exact(other)) => model == other,
            (Self::Exact(_), Self::Prefix(_)) => false,
            (Self::Prefix(prefix), Self::Exact(other) | Self::Prefix(other)) => other.starts_with(prefix),
        }
    }
}
