//! Route selection: which pool serves a request.

use std::time::Instant;

use penstock_agent::config::SteeringMode;

use crate::SOON;
use crate::cluster::{InferencePool, assert_carried, choosing, gateway, get, hundred, post, reroute, send, served};

/// GatewayWeightedAcrossTwoInferencePools: 70 to 30 over 200 requests, within ten percent or 4.5 standard deviations, whichever is
/// larger; in each pool the pod that its own picker chose.
pub(crate) async fn gateway_weighted_across_two_inference_pools(mode: SteeringMode) {
    const REQUESTS: usize = 200;
    const PRIMARY: f64 = 0.7;
    let (primary, secondary) = tokio::join!(InferencePool::start("primary", 2), InferencePool::start("secondary", 2));
    let split = r#"
[[routes]]
host = "example.com"
pools = [{ name = "primary", weight = 70 }, { name = "secondary", weight = 30 }]
"#;
    let gateway = gateway(mode, &[&primary, &secondary], split);
    // Each picker finds one of its own pods in this list.
    let chosen = [primary.pod(1), secondary.pod(0)];
    let request = choosing(post("/v1/completions").header("host", "example.com"), &chosen);
    let served = [hundred(&gateway, &request).await, hundred(&gateway, &request).await].concat();
    assert!(served.len() == REQUESTS && served.iter().all(|pod| chosen.contains(pod)), "{served:?}");
    let asked = [primary.epp.streams_started(), secondary.epp.streams_started()];
    let reached = [&primary, &secondary].map(|pool| pool.reached().0 as usize);
    assert_eq!((asked, asked.iter().sum()), (reached, REQUESTS));
    let deviation = (PRIMARY * (1.0 - PRIMARY) / REQUESTS as f64).sqrt();
    let share = asked[0] as f64 / REQUESTS as f64;
    assert!((share - PRIMARY).abs() <= (4.5 * deviation).max(0.10), "{share}");
    assert_carried(&gateway, mode);
}

/// HTTPRouteMultipleGatewaysDifferentPools: two gateways, each with a route to its own pool.
pub(crate) async fn http_route_multiple_gateways_different_pools(mode: SteeringMode) {
    let (primary, secondary) = tokio::join!(InferencePool::start("primary", 2), InferencePool::start("secondary", 2));
    let hosts = ["primary.example.com", "secondary.example.com"];
    let routes = [(hosts[0], "primary"), (hosts[1], "secondary")]
        .map(|(host, pool)| format!("[[routes]]\nhost = {host:?}\npool = {pool:?}\n"));
    let gateways = [gateway(mode, &[&primary], &routes[0]), gateway(mode, &[&secondary], &routes[1])];
    for (number, pool) in [&primary, &secondary].into_iter().enumerate() {
        let served = hundred(&gateways[number], &post("/v1/completions").header("host", hosts[number])).await;
        assert!(served.iter().all(|pod| pool.has(*pod)), "{served:?}");
        // The other gateway has no such route.
        let response = send(&gateways[1 - number], &post("/v1/completions").header("host", hosts[number])).await;
        assert_eq!((response.status(), response.error_code().as_str()), (404, "no_route"));
        assert_carried(&gateways[number], mode);
    }
    for pool in [&primary, &secondary] {
        assert_eq!((pool.requests(), pool.epp.streams_started()), (vec![50, 50], 100));
    }
}

/// InferencePoolHTTPRouteMultipleRules: one route with several rules; host and path select the pool, and only its EPP is asked.
pub(crate) async fn inference_pool_http_route_multiple_rules(mode: SteeringMode) {
    let (primary, secondary) = tokio::join!(InferencePool::start("primary", 1), InferencePool::start("secondary", 1));
    let rules = r#"
[[routes]]
host = "example.com"
path_prefix = "/primary"
pool = "primary"

[[routes]]
host = "example.com"
path_prefix = "/secondary"
pool = "secondary"

[[routes]]
host = "secondary.example.com"
pool = "secondary"
"#;
    let gateway = gateway(mode, &[&primary, &secondary], rules);
    let rows = [
        ("example.com", "/primary", Some(&primary)),
        ("example.com", "/primary/v1/completions", Some(&primary)),
        ("example.com", "/secondary", Some(&secondary)),
        ("example.com", "/secondary/v1/completions?beta=true", Some(&secondary)),
        ("secondary.example.com", "/primary", Some(&secondary)),
        ("secondary.example.com", "/", Some(&secondary)),
        ("example.com", "/", None),
        ("example.com", "/primaries", None),
        ("other.example.com", "/primary", None),
    ];
    for (host, path, expected) in rows {
        let before = (primary.epp.streams_started(), secondary.epp.streams_started());
        for request in [post(path), get(path)] {
            let response = send(&gateway, &request.header("host", host)).await;
            match expected {
                Some(pool) => assert_eq!(served(&response), pool.pod(0), "{host}{path}"),
                None => {
                    assert_eq!((response.status(), response.error_code().as_str()), (404, "no_route"), "{host}{path}");
                }
            }
        }
        let asked = (primary.epp.streams_started() - before.0, secondary.epp.streams_started() - before.1);
        let of = |pool: &InferencePool| expected.map_or(0, |expected| 2 * usize::from(std::ptr::eq(expected, pool)));
        assert_eq!(asked, (of(&primary), of(&secondary)), "{host}{path}");
    }
    assert_eq!((primary.requests(), secondary.requests()), (vec![4], vec![8]));
    assert_carried(&gateway, mode);
}

/// InferencePoolHTTPRoutePortValidation: a GET without a body reaches the pool at the pool's port, whether the Host has no port,
/// the same port, or another.
pub(crate) async fn inference_pool_http_route_port_validation(mode: SteeringMode) {
    let pool = InferencePool::start("primary", 2).await;
    let gateway = gateway(mode, &[&pool], "[[routes]]\nhost = \"example.com\"\npool = \"primary\"\n");
    for pod in [pool.pod(0), pool.pod(1)] {
        let other = if pod.port() == 8888 { 8889 } else { 8888 };
        for host in ["example.com".to_owned(), format!("example.com:{}", pod.port()), format!("example.com:{other}")] {
            for request in [get("/v1/models"), post("/v1/completions")] {
                let response = send(&gateway, &choosing(request.header("host", host.as_str()), &[pod])).await;
                assert_eq!(served(&response), pod, "{host}");
            }
        }
    }
    let seen = pool.pods[0].seen();
    let bodies: Vec<_> = seen.iter().map(|seen| (seen.method.as_str(), seen.body_framing.as_str())).collect();
    assert_eq!(bodies, [("GET", "none"), ("POST", "content-length")].repeat(3));
    assert_carried(&gateway, mode);
}

/// InferencePoolResolvedRefsCondition, the data plane's part: a pool is served through the routes that name it. A removed route
/// returns 404 and reaches no endpoint, and the pool's other route is unaffected.
pub(crate) async fn inference_pool_resolved_refs_condition(mode: SteeringMode) {
    let pool = InferencePool::start("primary", 1).await;
    let [one, two] = ["one.example.com", "two.example.com"];
    let route = |host: &str| format!("[[routes]]\nhost = {host:?}\npool = \"primary\"\n");
    let both = [route(one), route(two)].concat();
    let gateway = gateway(mode, &[&pool], &both);
    for (routes, status) in [(None, 200), (Some(route(two)), 404), (Some(both), 200)] {
        if let Some(routes) = routes {
            reroute(&gateway, &[&pool], &routes);
        }
        // Each worker takes the new routes at its own time.
        let (mut in_a_row, begin) = (0, Instant::now());
        while in_a_row < 20 {
            assert!(begin.elapsed() < SOON, "no {status} for {one}");
            let response = send(&gateway, &post("/v1/completions").header("host", one)).await;
            in_a_row = if response.status() == status { in_a_row + 1 } else { 0 };
        }
        let before = (pool.reached(), pool.epp.streams_started());
        let response = send(&gateway, &post("/v1/completions").header("host", one)).await;
        if status == 404 {
            assert_eq!(response.error_code(), "no_route");
            assert_eq!((pool.reached(), pool.epp.streams_started()), before);
        } else {
            assert_eq!(served(&response), pool.pod(0));
        }
        let response = send(&gateway, &post("/v1/completions").header("host", two)).await;
        assert_eq!(served(&response), pool.pod(0));
    }
    assert_carried(&gateway, mode);
}
