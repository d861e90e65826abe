//! `[[routes]]`: which requests go to which pool.

use super::{Pool, Route, document::Section, value};

pub(super) fn routes(root: &mut Section<'_>, pools: &[Pool]) -> Vec<Route> {
    let mut earlier: Vec<Route> = Vec::new();
    root.sections("routes", |section| {
        let route = Route {
            host: section.read("host", value::host),
            path_prefix: section.read("path_prefix", value::path_prefix),
            model: section.read("model", value::non_empty),
            pool: section.require("pool", "the name of a pool", value::pool_name).unwrap_or_default(),
        };
        if !pools.iter().any(|pool| pool.name == route.pool) {
            let names: Vec<&str> = pools.iter().map(|pool| pool.name.as_str()).collect();
            section.reject("pool", format_args!("{:?}", route.pool), format_args!("one of {}", names.join(", ")));
        }
        if let Some(index) = earlier.iter().position(|earlier| covers(earlier, &route)) {
            let found = format_args!("a route that routes[{index}] always wins over");
            section.reject("pool", found, "the narrower route first");
        }
        earlier.push(route);
    });
    earlier
}

/// Whether every request of `later` already matches `earlier`. Nested path prefixes are left to the author's judgement.
fn covers(earlier: &Route, later: &Route) -> bool {
    let same = |a: &Option<String>, b: &Option<String>| a.is_none() || a == b;
    same(&earlier.host, &later.host)
        && same(&earlier.path_prefix, &later.path_prefix)
        && same(&earlier.model, &later.model)
}
