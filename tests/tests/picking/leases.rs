//! Picks that hold for a while: how many requests, how long, and what ends them early.

use std::{net::SocketAddr, time::Duration};

use penstock_agent::config::{Config, LeaseLimits, PickPer};
use penstock_tests::{
    Client, Stage, eventually,
    scripted_epp::{Answering, Production, reply},
    stage::{echo, json},
};

use crate::SOON;

fn lease(time: Duration, requests: u32) -> impl FnOnce(&mut Config) {
    move |config| {
        config.pools[0].pick_per = PickPer::Lease;
        config.pools[0].lease = LeaseLimits { time, requests };
    }
}

/// The endpoint that answers one more request.
async fn served(stage: &mut Stage) -> SocketAddr {
    stage.request(&echo(json("m", 100))).await.served_by().unwrap()
}

/// The first request counts; the next connection has a lease of its own.
#[tokio::test]
async fn a_lease_is_for_so_many_requests() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_secs(60), 3)).await;
    for asked in 1..=3 {
        let home = served(&mut stage).await;
        assert_eq!([served(&mut stage).await, served(&mut stage).await], [home, home]);
        assert_eq!(stage.epp.streams_started(), asked);
    }
    assert_eq!(stage.agent.count("penstock_leased_requests_total", &[]), 6);
    let mut other = Client::connect(stage.agent.addr).await.unwrap();
    other.request(&echo(json("m", 100))).await.unwrap();
    assert_eq!(stage.epp.streams_started(), 4);
}

#[tokio::test]
async fn a_lease_is_for_so_long() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_millis(200), 1_000_000)).await;
    let begin = std::time::Instant::now();
    while stage.epp.streams_started() < 3 {
        served(&mut stage).await;
        assert!(begin.elapsed() < SOON);
    }
    assert!(begin.elapsed() >= Duration::from_millis(400), "two leases have ended");
    assert!(stage.agent.count("penstock_leased_requests_total", &[]) > 0);
}

/// What the picker has changed of the first request's head is changed of all.
#[tokio::test]
async fn headers_hold_with_the_pick() {
    let script = |all: &[SocketAddr]| {
        let picked = all[0].to_string();
        Answering::new(move |_| vec![reply::pick(&picked, &[("x-prefiller-host-port", "10.0.0.9:8000")])])
    };
    let mut stage = Stage::with(script, lease(Duration::from_secs(60), 10)).await;
    for _ in 0..3 {
        let seen = stage.request(&echo(json("m", 100))).await.echoed();
        assert_eq!(seen.header("x-prefiller-host-port"), Some("10.0.0.9:8000"));
    }
    assert_eq!(stage.epp.streams_started(), 1);
}

/// An endpoint that takes no more requests, or another configuration, ends it: the picker is asked again.
#[tokio::test]
async fn a_draining_endpoint_ends_the_lease() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_secs(60), 1000)).await;
    let home = served(&mut stage).await;
    assert_eq!(served(&mut stage).await, home);
    let mut config = stage.agent.config();
    for endpoint in &mut config.pools[0].endpoints {
        endpoint.draining = endpoint.address == home;
    }
    stage.agent.agent.reload(config).unwrap();
    let begin = std::time::Instant::now();
    while stage.epp.streams_started() < 2 {
        stage.client.request(&echo(json("m", 100))).await.unwrap();
        assert!(begin.elapsed() < SOON);
    }
    eventually(SOON, || stage.agent.metric("penstock_active_requests", &[]) == 0.0).await;
}

/// An endpoint that the pool does not list, and that may be dialled all the same, is as good.
#[tokio::test]
async fn a_lease_may_be_for_a_stranger() {
    let stranger = |config: &mut Config| {
        lease(Duration::from_secs(60), 3)(config);
        (config.pools[0].passthrough, config.pools[0].endpoints) = (true, Vec::new());
    };
    let mut stage = Stage::with(Production::new, stranger).await;
    let home = served(&mut stage).await;
    assert_eq!([served(&mut stage).await, served(&mut stage).await], [home, home]);
    assert_eq!(stage.epp.streams_started(), 1);
}
