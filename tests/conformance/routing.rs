//! Requests go to the picked endpoint, and the picker is told which endpoint served.

use penstock_agent::config::SteeringMode;
use penstock_tests::{eventually, model_server::Echo, scripted_epp::StreamRecord};

use crate::SOON;
use crate::cluster::{
    InferencePool, assert_carried, choosing, choosing_addresses, gateway, get, hundred, post, send, served,
};

/// GatewayFollowingEPPRouting: of a hundred POSTs, ten at once, none reaches a pod outside the selected set, for sets of one, two
/// and three.
pub(crate) async fn gateway_following_epp_routing(mode: SteeringMode) {
    let pool = InferencePool::start("primary", 4).await;
    let gateway = gateway(mode, &[&pool], "");
    for chosen in [[2].as_slice(), &[0, 3], &[1, 2, 3]] {
        let before = pool.requests();
        let pods: Vec<_> = chosen.iter().map(|&pod| pool.pod(pod)).collect();
        let served = hundred(&gateway, &choosing(post("/v1/completions"), &pods)).await;
        assert!(served.iter().all(|pod| pods.contains(pod)), "{chosen:?}: {served:?}");
        let reached: Vec<u64> = pool.requests().iter().zip(before).map(|(now, before)| now - before).collect();
        assert_eq!(reached.iter().sum::<u64>(), 100, "{chosen:?}: {reached:?}");
        for (pod, count) in reached.iter().enumerate() {
            assert_eq!(*count > 0, chosen.contains(&pod), "{chosen:?}: {reached:?}");
        }
    }
    assert_eq!(pool.epp.streams_started(), 300, "each is picked for once");
    assert_carried(&gateway, mode);
}

/// GatewayFollowingEPPRoutingWithDataParallelism: three target ports per address, each its own endpoint; port and address are
/// both followed exactly.
pub(crate) async fn gateway_following_epp_routing_with_data_parallelism(mode: SteeringMode) {
    let pool = InferencePool::data_parallel("ranks", 2).await;
    let gateway = gateway(mode, &[&pool], "");
    for (number, rank) in pool.pods.iter().enumerate() {
        let served = hundred(&gateway, &choosing(post("/v1/completions"), &[rank.addr])).await;
        assert!(served.iter().all(|served| *served == rank.addr), "{}: {served:?}", rank.addr);
        let expected: Vec<u64> = (0..pool.pods.len()).map(|other| if other <= number { 100 } else { 0 }).collect();
        assert_eq!(pool.requests(), expected);
    }
    // An address without a port selects all three of its ports and none of the other's.
    let address = pool.pod(0).ip();
    let served = hundred(&gateway, &choosing_addresses(post("/v1/completions"), &address.to_string())).await;
    assert!(served.iter().all(|served| served.ip() == address), "{served:?}");
    assert!(pool.pods[..3].iter().all(|rank| served.contains(&rank.addr)), "{served:?}");
    assert_carried(&gateway, mode);
}

/// GatewayDestinationEndpointServed: the picker finds the served endpoint in the metadata of the response-head message, and what
/// it sets on the response reaches the client.
pub(crate) async fn gateway_destination_endpoint_served(mode: SteeringMode) {
    let pool = InferencePool::start("primary", 3).await;
    let gateway = gateway(mode, &[&pool], "");
    for pod in &pool.pods {
        for request in [post("/v1/completions"), get("/v1/models")] {
            let response = send(&gateway, &choosing(request, &[pod.addr])).await;
            assert_eq!(served(&response), pod.addr);
            let named = response.header("x-conformance-test-served-endpoint");
            assert_eq!(named, Some(pod.addr.to_string().as_str()));
        }
    }
    eventually(SOON, || pool.epp.streams_open() == 0).await;
    let told: Vec<_> = pool.epp.streams().iter().map(StreamRecord::served).collect();
    let expected: Vec<_> =
        pool.pods.iter().flat_map(|pod| [Some(pod.addr.to_string()), Some(pod.addr.to_string())]).collect();
    assert_eq!(told, expected);
    assert_carried(&gateway, mode);
}

/// InferencePoolAppProtocol: HTTP/2 pods without TLS if the pool says so, otherwise HTTP/1.1; the picker is told the served
/// endpoint of each.
pub(crate) async fn inference_pool_app_protocol(mode: SteeringMode) {
    let (h2c, http, default) = tokio::join!(
        InferencePool::h2c("h2c", 2),
        async { InferencePool::start("http", 2).await.speaking("http1") },
        InferencePool::start("default", 2),
    );
    let routes = ["h2c", "http", "default"]
        .map(|name| format!("[[routes]]\nhost = \"{name}.example.com\"\npool = {name:?}\n"))
        .concat();
    let gateway = gateway(mode, &[&h2c, &http, &default], &routes);
    for (pool, host) in [(&h2c, "h2c.example.com"), (&http, "http.example.com"), (&default, "default.example.com")] {
        for pod in &pool.pods {
            for request in [post("/v1/completions"), get("/v1/models")] {
                let response = send(&gateway, &choosing(request.header("host", host), &[pod.addr])).await;
                assert_eq!(served(&response), pod.addr, "{host}");
                let named = response.header("x-conformance-test-served-endpoint");
                assert_eq!(named, Some(pod.addr.to_string().as_str()), "{host}");
            }
            // Pseudo-headers exist only in HTTP/2.
            let seen = pod.seen();
            let by_http2 = |seen: &Echo| seen.header(":scheme") == Some("http");
            assert_eq!((seen.len(), seen.iter().all(by_http2)), (2, host == "h2c.example.com"));
        }
        let served = hundred(&gateway, &post("/v1/completions").header("host", host)).await;
        assert!(served.iter().all(|pod| pool.has(*pod)), "{served:?}");
    }
    assert_carried(&gateway, mode);
}
