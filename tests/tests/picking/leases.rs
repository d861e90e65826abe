//! Leases: their number of requests, their duration, and what ends them early.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use penstock_agent::config::{Config, FailureMode, LeaseLimits, Network, Passthrough, PickPer};
use penstock_proto::ext_proc::ProcessingResponse;
use penstock_tests::{
    Client, Stage,
    content::Fnv,
    eventually,
    scripted_epp::{Answering, Fault, Faulty, Harm, Moment, Production, reply},
    stage::{echo, json},
};

use crate::SOON;

fn lease(time: Duration, requests: u32) -> impl FnOnce(&mut Config) {
    move |config| {
        config.pools[0].pick_per = PickPer::Lease;
        config.pools[0].lease = LeaseLimits { time, requests };
    }
}

/// Sends one more request; returns the endpoint that responds.
async fn served(stage: &mut Stage) -> SocketAddr {
    stage.request(&echo(json("m", 100))).await.served_by().unwrap()
}

/// The first request counts; the next connection gets its own lease.
#[tokio::test]
async fn lease_ends_after_request_count() {
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
async fn lease_ends_after_duration() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_millis(200), 1_000_000)).await;
    let begin = std::time::Instant::now();
    while stage.epp.streams_started() < 3 {
        served(&mut stage).await;
        assert!(begin.elapsed() < SOON);
    }
    assert!(begin.elapsed() >= Duration::from_millis(400), "two leases ended too early");
    assert!(stage.agent.count("penstock_leased_requests_total", &[]) > 0);
}

/// A picker that echoes every field and the whole body without changes gives a lease; leased requests keep their own fields and
/// bodies.
#[tokio::test]
async fn leased_requests_keep_their_own_fields_and_bodies() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_secs(60), 10)).await;
    for (turn, who) in ["alice", "bob", "carol"].into_iter().enumerate() {
        // The second body spills to a file and is compared too.
        let body = json(who, 100 + 700_000 * turn);
        let token = format!("Bearer {who}");
        let seen = stage.request(&echo(body.clone()).header("authorization", token.as_str())).await.echoed();
        assert_eq!(seen.header("authorization"), Some(token.as_str()));
        assert_eq!(seen.body_hash, Fnv::of(&body).value());
    }
    assert_eq!(stage.epp.streams_started(), 1);
    assert_eq!(stage.agent.count("penstock_leased_requests_total", &[]), 2);
}

/// Echoing a large spilled body gives a lease too.
#[tokio::test]
async fn echoed_spilled_body_gives_a_lease() {
    let mut stage = Stage::with(Production::new, lease(Duration::from_secs(60), 10)).await;
    for _ in 0..2 {
        assert_eq!(stage.request(&echo(json("m", 3 << 20))).await.status(), 200);
    }
    assert_eq!(stage.epp.streams_started(), 1);
}

/// A picker that changes anything but destination and trace fields is asked about each request.
#[tokio::test]
async fn changed_request_gives_no_lease() {
    type Answer = fn(&str) -> Vec<ProcessingResponse>;
    let cases: [(&str, Answer); 6] = [
        ("fields", |picked| vec![reply::pick(picked, &[("x-prefiller-host-port", "10.0.0.9:8000")])]),
        ("fields", |picked| vec![reply::pick(picked, &[("authorization", "Bearer endpoint")])]),
        ("fields", |picked| {
            let mut removing = reply::mutation(&[(reply::DESTINATION, picked)]);
            removing.remove_headers = vec!["authorization".to_owned()];
            vec![reply::request_headers(removing)]
        }),
        ("fields", |picked| vec![reply::pick(picked, &[("content-length", "7")])]),
        ("body", |picked| {
            let renamed = Bytes::from(json("renamed", 100));
            [reply::pick(picked, &[])].into_iter().chain(reply::request_body(&renamed)).collect()
        }),
        ("body", |picked| [reply::pick(picked, &[])].into_iter().chain(reply::request_body(&Bytes::new())).collect()),
    ];
    for (index, (reason, answer)) in cases.into_iter().enumerate() {
        let script = move |all: &[SocketAddr]| {
            let picked = all[0].to_string();
            Answering::new(move |_| answer(&picked))
        };
        for pick_per in [PickPer::Lease, PickPer::Connection] {
            let mut stage = Stage::with(script, |config| {
                lease(Duration::from_secs(60), 10)(config);
                config.pools[0].pick_per = pick_per;
            })
            .await;
            for asked in 1..=3 {
                let request = echo(json("m", 200)).header("authorization", "Bearer client");
                assert_eq!(stage.request(&request).await.status(), 200);
                assert_eq!(stage.epp.streams_started(), asked, "case {index}");
            }
            let label = format!("reason=\"{reason}\"");
            assert_eq!(stage.agent.count("penstock_picks_not_held_total", &[&label]), 3, "case {index}");
        }
    }
}

/// Trace context set by the picker applies to its own request and is not a change.
#[tokio::test]
async fn picker_trace_fields_do_not_apply_to_leased_requests() {
    let script = |all: &[SocketAddr]| {
        let picked = all[0].to_string();
        let trace = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("baggage", "k=v")];
        Answering::new(move |_| vec![reply::pick(&picked, &trace)])
    };
    let mut stage = Stage::with(script, lease(Duration::from_secs(60), 10)).await;
    let first = stage.request(&echo(json("m", 100))).await.echoed();
    assert_eq!(first.header("baggage"), Some("k=v"));
    let second = stage.request(&echo(json("m", 100))).await.echoed();
    assert_eq!(second.header("baggage"), None);
    assert!(!second.header("traceparent").unwrap_or_default().contains("0af7651916cd43dd8448eb211c80319c"));
    assert_eq!(stage.epp.streams_started(), 1);
}

/// While a pool fails open, the picker is asked about every request.
#[tokio::test]
async fn fail_open_gives_no_lease_and_no_pin() {
    for pick_per in [PickPer::Lease, PickPer::Connection] {
        let script = |all: &[SocketAddr]| {
            let fault = Fault::At(Moment::HeaderReply, Harm::Status(tonic::Code::Internal));
            Faulty::new(Production::new(all), fault).times(2)
        };
        let mut stage = Stage::with(script, |config| {
            lease(Duration::from_secs(60), 10)(config);
            (config.pools[0].pick_per, config.pools[0].failure_mode) = (pick_per, FailureMode::Open);
        })
        .await;
        for _ in 0..5 {
            assert_eq!(stage.request(&echo(json("m", 100))).await.status(), 200);
        }
        // Two failures, then one lease that holds.
        assert_eq!(stage.epp.streams_started(), 3, "{pick_per:?}");
        assert_eq!(stage.agent.count("penstock_picks_not_held_total", &[r#"reason="fail_open""#]), 2);
    }
}

/// A draining endpoint or a new configuration ends the lease: the picker is asked again.
#[tokio::test]
async fn draining_endpoint_ends_lease() {
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

/// An endpoint outside the pool that passthrough admits can be leased too.
#[tokio::test]
async fn lease_for_endpoint_outside_pool_is_kept() {
    let stranger = |config: &mut Config| {
        lease(Duration::from_secs(60), 3)(config);
        config.pools[0].passthrough = Passthrough::Networks(vec![Network::parse("127.0.0.0/8").unwrap()]);
        config.pools[0].endpoints.clear();
    };
    let mut stage = Stage::with(Production::new, stranger).await;
    let home = served(&mut stage).await;
    assert_eq!([served(&mut stage).await, served(&mut stage).await], [home, home]);
    assert_eq!(stage.epp.streams_started(), 1);
}

/// Another path is a change beyond the destination; the echo of the request's own is not.
#[tokio::test]
async fn changed_path_gives_no_lease() {
    for (path, asked) in [("/test/echo?by=epp", 2), ("/test/echo", 1)] {
        let script = |all: &[SocketAddr]| {
            let picked = all[0].to_string();
            Answering::new(move |_| vec![reply::pick(&picked, &[(":path", path)])])
        };
        let mut stage = Stage::with(script, lease(Duration::from_secs(60), 10)).await;
        for _ in 0..2 {
            assert_eq!(stage.request(&echo(json("m", 100))).await.echoed().target, path);
        }
        assert_eq!(stage.epp.streams_started(), asked, "{path}");
    }
}
