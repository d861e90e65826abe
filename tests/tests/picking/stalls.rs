//! Pickers that let requests wait until the deadline: one that decides others meanwhile holds the request back; one that
//! decides nothing has stalled, and no further request waits for it until it decides again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use penstock_agent::config::{Config, Epp, FailureMode};
use penstock_proto::{
    ext_proc::{HttpBody, HttpHeaders},
    health::health_check_response::ServingStatus,
};
use penstock_tests::{
    Client, Stage,
    content::Fnv,
    eventually,
    scripted_epp::{Answer, Exchange, Production, Script, header},
    stage::{echo, epp, json},
};
use tonic::Status;

use crate::SOON;

const DECISION: Duration = Duration::from_millis(400);

/// Decides at once or never: never for requests with the field `x-hold`, and for none while it is stuck. Its health reports
/// serving.
struct Holding {
    inner: Production,
    stuck: Arc<AtomicBool>,
}

impl Holding {
    async fn hold(&self, exchange: &Exchange) {
        if self.stuck.load(Relaxed) || header(&exchange.request_headers, "x-hold").is_some() {
            std::future::pending::<()>().await;
        }
    }
}

#[tonic::async_trait]
impl Script for Holding {
    fn health(&self, _: &str) -> Result<ServingStatus, Status> {
        Ok(ServingStatus::Serving)
    }

    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream {
            self.hold(exchange).await;
        }
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream {
            self.hold(exchange).await;
        }
        self.inner.request_body(exchange, body).await
    }
}

struct Scene {
    stage: Stage,
    stuck: Arc<AtomicBool>,
}

async fn scene(mode: FailureMode, open_on_deadline: bool) -> Scene {
    scene_with(mode, |config| epp(config).open_on_deadline = open_on_deadline).await
}

async fn scene_with(mode: FailureMode, adjust: impl FnOnce(&mut Config)) -> Scene {
    let stuck = Arc::<AtomicBool>::default();
    let script = |all: &[std::net::SocketAddr]| Holding { inner: Production::new(all), stuck: Arc::clone(&stuck) };
    let stage = Stage::with(script, |config| {
        config.pools[0].failure_mode = mode;
        epp(config).decision_timeout = Some(DECISION);
        epp(config).health_interval = Some(Duration::from_millis(50));
        adjust(config);
    })
    .await;
    Scene { stage, stuck }
}

impl Scene {
    async fn client(&self) -> Client {
        Client::connect(self.stage.agent.addr).await.unwrap()
    }

    fn failures(&self, reason: &str) -> u64 {
        self.stage.agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")])
    }

    /// Sends a request that the picker holds back while it decides others; returns the status.
    async fn held(&mut self) -> u16 {
        let mut client = self.client().await;
        let begun = self.stage.epp.streams_started();
        client.send(&echo(json("m", 100)).header("x-hold", "1")).await.unwrap();
        eventually(SOON, || self.stage.epp.streams_started() > begun).await;
        assert_eq!(self.stage.request(&echo(json("m", 100))).await.status(), 200);
        client.response().await.unwrap().status()
    }
}

#[test]
fn default_decision_deadline_exceeds_picker_queue_time() {
    // llm-d's flow control holds a request for up to a minute.
    assert_eq!(Epp::new("").decision_timeout, Some(Duration::from_secs(75)));
}

#[tokio::test]
async fn picker_deciding_other_requests_may_hold_one() {
    for (mode, open_on_deadline, status) in
        [(FailureMode::Closed, false, 503), (FailureMode::Open, false, 503), (FailureMode::Open, true, 200)]
    {
        let mut scene = scene(mode, open_on_deadline).await;
        assert_eq!(scene.held().await, status, "{mode:?} {open_on_deadline}");
        assert_eq!((scene.failures("held"), scene.failures("deadline")), (1, 0));
        // The picker is asked as before.
        assert_eq!(scene.stage.request(&echo(json("m", 100))).await.status(), 200);
        assert_eq!(scene.stage.agent.count("penstock_epp_stalls_total", &[]), 0);
    }
}

/// A health status of serving does not count as a decision.
#[tokio::test]
async fn stalled_picker_is_not_awaited() {
    for (mode, status) in [(FailureMode::Open, 200), (FailureMode::Closed, 503)] {
        let mut scene = scene(mode, false).await;
        let body = json("m", 200_000);
        assert_eq!(scene.stage.request(&echo(body.clone())).await.status(), 200);
        scene.stuck.store(true, Relaxed);
        let begin = Instant::now();
        assert_eq!(scene.stage.request(&echo(body.clone())).await.status(), status);
        assert!(begin.elapsed() >= DECISION);
        assert_eq!((scene.failures("deadline"), scene.stage.agent.count("penstock_epp_stalls_total", &[])), (1, 1));

        // No further request waits; in the background at most one at a time is put to the picker.
        let begun = scene.stage.epp.streams_started();
        let begin = Instant::now();
        for _ in 0..20 {
            let response = scene.client().await.request(&echo(body.clone())).await.unwrap();
            assert_eq!(response.status(), status);
            if status == 200 {
                assert_eq!(response.echoed().body_hash, Fnv::of(&body).value());
            }
        }
        let took = begin.elapsed();
        assert!(scene.stage.epp.streams_open() <= 1);
        let probes = (scene.stage.epp.streams_started() - begun) as u32;
        assert!(probes <= 1 + took.as_millis().div_ceil(DECISION.as_millis()) as u32, "{probes} in {took:?}");
        assert_eq!(scene.failures("stalled"), 20);

        // The picker decides again: a background request detects it.
        scene.stuck.store(false, Relaxed);
        let begin = Instant::now();
        loop {
            let failed = scene.failures("stalled");
            let response = scene.client().await.request(&echo(json("m", 100))).await.unwrap();
            if scene.failures("stalled") == failed {
                assert_eq!(response.status(), 200);
                break;
            }
            assert!(begin.elapsed() < SOON);
        }
        eventually(SOON, || scene.stage.epp.streams_open() == 0).await;
    }
}

/// A restarted picker is asked at once, and not only after it has decided a probe.
#[tokio::test]
async fn stalled_picker_that_restarts_is_asked() {
    let mut scene = scene(FailureMode::Closed, false).await;
    scene.stuck.store(true, Relaxed);
    assert_eq!(scene.stage.request(&echo(json("m", 100))).await.status(), 503);
    assert_eq!(scene.stage.agent.count("penstock_epp_stalls_total", &[]), 1);
    scene.stage.epp.stop();
    let is = |scene: &Scene, state: &str| {
        scene.stage.agent.count("penstock_epp_replicas", &[&format!("state=\"{state}\"")]) == 1
    };
    eventually(SOON, || is(&scene, "unreachable")).await;
    scene.stuck.store(false, Relaxed);
    scene.stage.epp.restart().await.unwrap();
    eventually(SOON, || is(&scene, "serving")).await;
    let response = scene.client().await.request(&echo(json("m", 100))).await.unwrap();
    assert_eq!((response.status(), scene.failures("stalled")), (200, 0));
}

/// What the background keeps of a request counts after the request has ended; where there is no room, another request is put to
/// the replica.
#[tokio::test]
async fn probe_of_a_stalled_picker_counts_its_body_or_is_not_made() {
    let mut scene = scene_with(FailureMode::Open, |config| {
        config.limits.total_body_bytes = 300_000;
        epp(config).decision_timeout = Some(Duration::from_secs(2));
    })
    .await;
    scene.stuck.store(true, Relaxed);
    assert_eq!(scene.stage.request(&echo(json("m", 100))).await.status(), 200);
    assert_eq!(scene.failures("deadline"), 1);
    eventually(SOON, || scene.stage.epp.streams_open() == 0).await;
    let memory = |scene: &Scene| scene.stage.agent.count("penstock_request_body_memory_bytes", &[]);
    for (length, probes) in [(200_000, 0), (100_000, 1)] {
        let begun = scene.stage.epp.streams_started();
        let body = json("m", length);
        let most = (probes * body.len()) as u64;
        assert_eq!(scene.stage.request(&echo(body)).await.status(), 200);
        // What the picker's windows have taken of a probe no longer counts.
        eventually(SOON, || memory(&scene) <= most).await;
        eventually(SOON, || scene.stage.epp.streams_started() - begun == probes).await;
        assert_eq!(scene.stage.epp.streams_open(), probes);
    }
    eventually(SOON, || memory(&scene) == 0 && scene.stage.epp.streams_open() == 0).await;
}
