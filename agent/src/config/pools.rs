//! `[[pools]]`: the endpoints of each pool, its picker, and where requests go when the picker fails.

use std::net::SocketAddr;

use super::{
    AppProtocol, FailureMode, LeaseLimits, Node, PickPer, Picker, PinLimits, Pool, document::Section, endpoints,
    health, passthrough, picker, retry, subset, timeouts, value,
};
use crate::listeners::Listeners;

pub(super) fn pools(root: &mut Section<'_>, listen: SocketAddr, own: &Listeners, node: &Node) -> Vec<Pool> {
    let mut names: Vec<String> = Vec::new();
    let pools = root.sections("pools", |section| {
        let pool = pool(section, listen, own, node);
        if names.contains(&pool.name) {
            section.reject("name", format_args!("{:?} again", pool.name), "a name that no other pool has");
        }
        names.push(pool.name.clone());
        pool
    });
    if pools.is_empty() {
        root.reject("pools", "none", "at least one [[pools]] section");
    }
    pools
}

fn pool(section: &mut Section<'_>, listen: SocketAddr, own: &Listeners, node: &Node) -> Pool {
    const MODES: &[(&str, FailureMode)] = &[("open", FailureMode::Open), ("closed", FailureMode::Closed)];
    const PROTOCOLS: &[(&str, AppProtocol)] = &[("http1", AppProtocol::Http1), ("h2c", AppProtocol::H2c)];
    const PICKS: &[(&str, PickPer)] =
        &[("request", PickPer::Request), ("connection", PickPer::Connection), ("lease", PickPer::Lease)];
    let ports = endpoints::ports(section);
    let (picker, session_headers) =
        section.section("picker", |section| (picker::picker(section), picker::session_headers(section)));
    let pool = Pool {
        name: section.require("name", "the name of the pool", value::pool_name).unwrap_or_default(),
        endpoints: endpoints::listed(section, &ports, listen),
        endpoints_dns: endpoints::named(section, &ports),
        endpoints_file: endpoints::file(section),
        ports,
        app_protocol: section.read("app_protocol", value::one_of(PROTOCOLS)).unwrap_or_default(),
        pick_per: section.read("pick_per", value::one_of(PICKS)).unwrap_or_default(),
        pin: section.section("pin", |section| PinLimits {
            age: section.read("age", value::duration_or_off).unwrap_or(PinLimits::default().age),
        }),
        lease: section.section("lease", lease),
        failure_mode: section.read("failure_mode", value::one_of(MODES)).unwrap_or(FailureMode::Closed),
        default_upstream: section.read("default_upstream", value::endpoint),
        passthrough: section.read("passthrough", passthrough::passthrough).unwrap_or_default(),
        picker,
        session_headers,
        subset: section.section("subset", |section| subset::subset(section, node)),
        retry: section.section("retry", retry::retry),
        ejection: section.section("ejection", health::ejection),
        health: health::check(section),
        timeouts: section.section("timeouts", timeouts::overrides),
    };
    check_endpoints(section, &pool);
    check_own(section, &pool, own);
    check_failure_mode(section, &pool);
    pool
}

fn lease(section: &mut Section<'_>) -> LeaseLimits {
    let default = LeaseLimits::default();
    LeaseLimits {
        time: section.read("time", value::duration).unwrap_or(default.time),
        requests: section.read("requests", value::integer(1..=1_000_000)).unwrap_or(default.requests),
    }
}

fn check_endpoints(section: &Section<'_>, pool: &Pool) {
    let named_by_epp = matches!(pool.picker, Picker::Epp(_)) && !pool.passthrough.is_off();
    if !has_endpoints(pool) && !named_by_epp {
        section.reject(
            "endpoints",
            "none",
            r#"at least one, endpoints_dns, endpoints_file, or picker.kind = "epp" with passthrough = true"#,
        );
    }
}

/// Whether there is a source of endpoints; what a name or a file gives is not known yet.
fn has_endpoints(pool: &Pool) -> bool {
    !pool.endpoints.is_empty() || pool.endpoints_dns.is_some() || pool.endpoints_file.is_some()
}

/// Requests that the agent sends to itself would go round for ever.
fn check_own(section: &Section<'_>, pool: &Pool, own: &Listeners) {
    let expected = "an address where this agent does not listen";
    if let Some(upstream) = pool.default_upstream.filter(|upstream| own.accept(*upstream)) {
        section.reject("default_upstream", format_args!("\"{upstream}\""), expected);
    }
    if let Picker::Epp(epp) = &pool.picker {
        for address in
            epp.addresses.iter().filter_map(|address| address.parse().ok()).filter(|address| own.accept(*address))
        {
            section.reject("picker.address", format_args!("\"{address}\""), expected);
        }
    }
}

fn check_failure_mode(section: &Section<'_>, pool: &Pool) {
    match pool.failure_mode {
        FailureMode::Closed if matches!(&pool.picker, Picker::Epp(epp) if epp.open_on_deadline) => {
            let found = r#"failure_mode "closed", which never uses it"#;
            section.reject("picker.open_on_deadline", found, r#"failure_mode = "open""#);
        }
        FailureMode::Closed if pool.default_upstream.is_some() => {
            section.reject(
                "default_upstream",
                r#"failure_mode "closed", which never uses it"#,
                r#"failure_mode = "open""#,
            );
        }
        FailureMode::Open if pool.default_upstream.is_none() && !has_endpoints(pool) => {
            section.reject("failure_mode", r#""open" without a place to send to"#, "endpoints or default_upstream");
        }
        FailureMode::Closed | FailureMode::Open => {}
    }
}
