//! Endpoint lists with unusable entries: the others are used in order.

use std::{net::SocketAddr, time::Instant};

use penstock_agent::config::FailureMode;
use penstock_tests::{
    ModelServer, Request, Stage, eventually,
    http2_frames::{Frame, Http2Frames, kind},
    model_server::Options,
    scripted_epp::{Answering, reply},
    stage::{echo, epp},
};

use crate::SOON;

/// `GOOD` in the list stands for an endpoint of the pool.
async fn stage(list: &'static str, by_metadata: bool, mode: FailureMode) -> Stage {
    let script = move |all: &[SocketAddr]| {
        let list = list.replace("GOOD", &all[1].to_string()).replace("PORT", &all[1].port().to_string());
        Answering::new(move |_| {
            let mut message = reply::pick(&list, &[]);
            if !by_metadata {
                message.dynamic_metadata = None;
            }
            vec![message]
        })
    };
    Stage::with(script, |config| config.pools[0].failure_mode = mode).await
}

#[tokio::test]
async fn invalid_list_entries_are_skipped() {
    let lists = [
        ("pod-7:8000,GOOD", 1, 0),
        ("GOOD,127.0.0.1:99999", 1, 0),
        ("GOOD,", 0, 0),
        (" , GOOD", 0, 0),
        ("127.0.0.1:0,0.0.0.0:80,[fe80::1%eth0]:80,GOOD", 3, 0),
        ("192.0.2.1:8000,GOOD", 0, 1),
        ("[::ffff:127.0.0.1]:PORT", 0, 0),
    ];
    for (list, invalid, strangers) in lists {
        for by_metadata in [true, false] {
            let mut stage = stage(list, by_metadata, FailureMode::Closed).await;
            assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr), "{list}");
            let count = |reason: &str| {
                let label = format!("reason=\"{reason}\"");
                stage.agent.count("penstock_epp_endpoints_passed_over_total", &[&label])
            };
            assert_eq!((count("invalid"), count("not_admitted")), (invalid, strangers), "{list}");
        }
    }
}

#[tokio::test]
async fn list_without_endpoints_is_a_failure() {
    for mode in [FailureMode::Closed, FailureMode::Open] {
        let mut stage = stage("pod-7:8000,pod-8:8000", true, mode).await;
        let response = stage.request(&echo("{}")).await;
        let failed = (response.status(), response.error_code()) == (503, "picker_failed".to_owned());
        assert_eq!(failed, mode == FailureMode::Closed);
        assert_eq!(failed, response.status() != 200);
        assert_eq!(stage.agent.count("penstock_epp_failures_total", &[r#"reason="bad_destination""#]), 1);
    }
}

/// Without brackets, as some pickers join address and port.
#[tokio::test]
async fn bare_ipv6_endpoint_is_found_in_pool() {
    let listen = "[::1]:0".parse().unwrap();
    let server = ModelServer::start(Options { listen, ..Options::default() }).await.unwrap();
    for host in ["::1", "0:0:0:0:0:0:0:1", "0:0::1"] {
        let named = format!("{host}:{}", server.addr.port());
        let script = move |_: &[SocketAddr]| Answering::new(move |_| vec![reply::pick(&named, &[])]);
        let mut stage = Stage::with(script, |config| config.pools[0].endpoints.push(server.addr.into())).await;
        assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(server.addr), "{host}");
    }
}

/// An endpoint answers a preflight whatever the picker does, and the picker is not asked.
#[tokio::test]
async fn preflight_is_served_without_picker() {
    let mut stage = Stage::with(
        |_| Answering::new(|_| vec![reply::immediate(500, &[], "")]),
        |config| epp(config).addresses.truncate(1),
    )
    .await;
    let preflight = || {
        let request = Request::new("OPTIONS", "/test/echo").header("origin", "http://app.example");
        request.header("access-control-request-method", "POST")
    };
    for _ in 0..2 {
        stage.epp.stop();
        assert_eq!(stage.request(&preflight()).await.status(), 200);
        assert_eq!(stage.request(&Request::get("/test/echo")).await.status(), 503);
        stage.epp.restart().await.unwrap();
        assert_eq!(stage.request(&preflight()).await.status(), 200);
    }
    assert_eq!(stage.epp.streams_started(), 0);
    // Other OPTIONS requests are treated like any request, once the picker is connected again.
    let (other, begin) = (Request::new("OPTIONS", "/test/echo"), Instant::now());
    let mut status = 503;
    while status == 503 && begin.elapsed() < SOON {
        status = stage.request(&other).await.status();
    }
    assert_eq!(status, 500);
    eventually(SOON, || stage.epp.streams_started() == 1).await;
}

/// `OPTIONS *` concerns the whole server: an endpoint answers it whatever the picker does, over both versions of HTTP.
#[tokio::test]
async fn options_asterisk_is_served_without_picker() {
    let mut stage = Stage::new(|_| Answering::new(|_| vec![reply::immediate(500, &[], "")])).await;
    stage.epp.stop();
    let response = stage.request(&Request::new("OPTIONS", "*")).await;
    assert!(response.served_by().is_some(), "{} {}", response.status(), response.text());
    let mut http2 = Http2Frames::connect(stage.agent.addr).await.unwrap();
    let fields = [(":method", "OPTIONS"), (":scheme", "http"), (":path", "*"), (":authority", "x")];
    http2.send(&Frame::headers(1, true, &fields)).await.unwrap();
    let head = http2.find(|frame| frame.stream == 1).await.unwrap().expect("no response");
    assert_eq!((head.kind, head.status()), (kind::HEADERS, Some(response.status())));
    let seen = [stage.one.seen(), stage.two.seen()].concat();
    let targets: Vec<_> = seen.iter().map(|seen| (seen.method.as_str(), seen.target.as_str())).collect();
    assert_eq!(targets, [("OPTIONS", "*"); 2]);
    // With Max-Forwards 0 the agent answers it.
    let last = stage.request(&Request::new("OPTIONS", "*").header("max-forwards", "0")).await;
    assert_eq!((last.status(), last.served_by()), (200, None), "{}", last.text());
    assert_eq!(stage.epp.streams_started(), 0);
}
