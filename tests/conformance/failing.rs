//! A pool whose EPP is missing.
//!
//! Up to its version of August 2026, the suite's fail-open test took down the EPP of another pool, so it passed whatever the
//! gateway did. Here the EPP that goes away is the one that picked before.

use futures_util::future::join_all;
use penstock_agent::config::SteeringMode;
use penstock_tests::Refusing;
use tokio::time::timeout;

use crate::SOON;
use crate::cluster::{InferencePool, assert_carried, choosing, gateway, get, hundred, post, send, served};

const ROUTES: &str = r#"
[[routes]]
host = "primary.example.com"
pool = "primary"

[[routes]]
host = "secondary.example.com"
pool = "secondary"
"#;
const PRIMARY: &str = "primary.example.com";
const SECONDARY: &str = "secondary.example.com";

/// EppUnAvailableFailOpen: requests are pinned to one pod while the pool's EPP runs; without it, a POST with JSON still gets a 200
/// from a pod of the pool. The other pool's EPP and pods are unaffected, and once the EPP is back, its picks are followed again.
pub(crate) async fn epp_unavailable_fail_open(mode: SteeringMode) {
    let primary = InferencePool::start("primary", 2).await;
    let mut secondary = InferencePool::start("secondary", 3).await.failing_open();
    let gateway = gateway(mode, &[&primary, &secondary], ROUTES);
    let pinned = secondary.pod(1);
    let request = choosing(post("/v1/completions").header("host", SECONDARY), &[pinned]);
    let served_by = hundred(&gateway, &request).await;
    assert!(served_by.iter().all(|pod| *pod == pinned), "{served_by:?}");

    secondary.epp.stop();
    for _ in 0..3 {
        assert!(secondary.has(served(&send(&gateway, &request).await)));
    }
    let served_by = hundred(&gateway, &request).await;
    assert!(served_by.iter().all(|pod| secondary.has(*pod)), "{served_by:?}");
    assert!(secondary.has(served(&send(&gateway, &get("/v1/models").header("host", SECONDARY)).await)));
    assert_eq!(primary.reached(), (0, 0));
    let other = choosing(post("/v1/completions").header("host", PRIMARY), &[primary.pod(1)]);
    assert_eq!(served(&send(&gateway, &other).await), primary.pod(1));

    secondary.epp.restart().await.unwrap();
    // Each worker connects again by itself.
    let followed = async { while hundred(&gateway, &request).await.iter().any(|pod| *pod != pinned) {} };
    timeout(SOON, followed).await.expect("the picks are followed again");
    assert_carried(&gateway, mode);
}

/// The counterpart: a pool that fails closed returns 5xx and reaches no pod of any pool.
pub(crate) async fn epp_unavailable_fail_closed(mode: SteeringMode) {
    let primary = InferencePool::start("primary", 2).await.failing_open();
    let mut secondary = InferencePool::start("secondary", 3).await;
    let gateway = gateway(mode, &[&primary, &secondary], ROUTES);
    let request = choosing(post("/v1/completions").header("host", SECONDARY), &[secondary.pod(1)]);
    assert_eq!(served(&send(&gateway, &request).await), secondary.pod(1));

    secondary.epp.stop();
    let before = secondary.reached();
    for request in [&request, &get("/v1/models").header("host", SECONDARY)] {
        for response in join_all((0..10).map(|_| send(&gateway, request))).await {
            assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
        }
    }
    assert_eq!((secondary.reached(), primary.reached()), (before, (0, 0)));

    secondary.epp.restart().await.unwrap();
    assert_eq!(served(&send(&gateway, &request).await), secondary.pod(1));
}

/// InferencePoolInvalidEPPService: the pool's EPP never existed. Requests to the pool get a 5xx; the gateway stays up and serves
/// the other pool.
pub(crate) async fn inference_pool_invalid_epp_service(mode: SteeringMode) {
    let refusing = Refusing::new().unwrap();
    let broken = InferencePool::start("primary", 2).await.with_epp_at(refusing.addr);
    let secondary = InferencePool::start("secondary", 2).await;
    let gateway = gateway(mode, &[&broken, &secondary], ROUTES);
    let requests = [post("/v1/completions"), get("/v1/models")].map(|request| request.header("host", PRIMARY));
    let failing = join_all(requests.iter().cycle().take(20).map(|request| send(&gateway, request)));
    let working = async {
        for _ in 0..10 {
            let other = choosing(post("/v1/completions").header("host", SECONDARY), &[secondary.pod(1)]);
            assert_eq!(served(&send(&gateway, &other).await), secondary.pod(1));
        }
    };
    let (responses, ()) = tokio::join!(failing, working);
    for response in responses {
        assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
    }
    assert_eq!((broken.reached(), broken.epp.streams_started()), ((0, 0), 0));
    assert!(!gateway.agent.has_failed());
    assert_carried(&gateway, mode);
}
