//! `[pools.ejection]` and `[pools.health]`: when an endpoint is avoided, by what requests see of it and by asking it.

use http::uri::PathAndQuery;

use super::{Ejection, HealthCheck, document::Section, value};

pub(super) fn ejection(section: &mut Section<'_>) -> Ejection {
    let default = Ejection::default();
    let ejection = Ejection {
        failures: section.read("failures", value::integer(0..=1000)).unwrap_or(default.failures),
        base: section.read("base", value::duration).unwrap_or(default.base),
        max: section.read("max", value::duration).unwrap_or(default.max),
        max_percent: section.read("max_percent", value::integer(0..=100)).unwrap_or(default.max_percent),
        server_errors: section.read("server_errors", value::boolean).unwrap_or(default.server_errors),
    };
    if ejection.base > ejection.max {
        let key = if section.has("base") { "base" } else { "max" };
        section.reject(key, "a base above max", "base up to max");
    }
    ejection
}

/// Checks are on where the section names a path.
pub(super) fn check(section: &mut Section<'_>) -> Option<HealthCheck> {
    let given = section.has("health");
    let check = section.section("health", |section| {
        if given && !section.has("path") {
            section.reject("path", "nothing", r#"the path to ask for, such as "/health""#);
        }
        let path = section.read("path", value::path_and_query);
        let default = HealthCheck::new(path.unwrap_or(PathAndQuery::from_static("/")));
        HealthCheck {
            interval: section.read("interval", value::duration).unwrap_or(default.interval),
            timeout: section.read("timeout", value::duration).unwrap_or(default.timeout),
            unhealthy_after: section
                .read("unhealthy_after", value::integer(1..=100))
                .unwrap_or(default.unhealthy_after),
            healthy_after: section.read("healthy_after", value::integer(1..=100)).unwrap_or(default.healthy_after),
            path: default.path,
        }
    });
    given.then_some(check)
}
