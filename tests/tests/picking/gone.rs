//! An endpoint that is gone and still known to the EPP: the EPP is asked once more, with a hint that lacks it. Never about a
//! request that may have been processed.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use penstock_agent::config::{Config, FailureMode, Network, Passthrough, PickPer, SteeringMode};
use penstock_proto::ext_proc::{HttpBody, HttpHeaders};
use penstock_tests::{
    Client, ModelServer, Refusing, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    client::Response,
    content::Fnv,
    eventually,
    scripted_epp::{Answer, Answering, Exchange, Fault, Faulty, Harm, Moment, Production, Script, StreamEnd, reply},
    stage::{echo, json},
};
use tokio::{io::AsyncReadExt, net::TcpListener};

use crate::SOON;

/// A pool with an endpoint that is gone and one that serves.
struct World {
    client: Client,
    agent: TestAgent,
    epp: ScriptedEpp,
    live: ModelServer,
    gone: Refusing,
}

impl World {
    /// `script` gets the addresses of both endpoints, first of the one that is gone. Endpoints are not ejected.
    async fn new<S: Script>(
        script: impl FnOnce(SocketAddr, SocketAddr) -> S,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        let (live, gone) = (ModelServer::start(Default::default()).await.unwrap(), Refusing::new().unwrap());
        let epp = ScriptedEpp::start(script(gone.addr, live.addr)).await.unwrap();
        let pool = epp_pool(&[gone.addr, live.addr], epp.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            config.pools[0].ejection.failures = 0;
            adjust(config);
        });
        let client = Client::connect(agent.addr).await.unwrap();
        Self { client, agent, epp, live, gone }
    }

    async fn request(&mut self, request: &Request) -> Response {
        self.client.request(request).await.unwrap()
    }

    /// How often the EPP was to pick once more with this outcome, of all.
    fn repicks(&self, outcome: &str) -> (u64, u64) {
        let count = |labels: &[&str]| self.agent.count("penstock_epp_repicks_total", labels);
        (count(&[&format!("reason=\"{outcome}\"")]), count(&[]))
    }
}

fn obeying(gone: SocketAddr, live: SocketAddr) -> Production {
    Production::new(&[gone, live])
}

/// Always picks `endpoint`, whatever the hint.
fn stubborn(endpoint: SocketAddr) -> Answering {
    Answering::new(move |_| vec![reply::pick(&endpoint.to_string(), &[])])
}

/// Counts the requests that it has open, as EPPs count load.
pub(crate) struct Books<S> {
    pub(crate) inner: S,
    pub(crate) open: Arc<AtomicI64>,
    pub(crate) most: Arc<AtomicI64>,
}

#[tonic::async_trait]
impl<S: Script> Script for Books<S> {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        let open = self.open.fetch_add(1, Relaxed) + 1;
        self.most.fetch_max(open, Relaxed);
        self.inner.request_headers(exchange, headers).await
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        self.inner.request_body(exchange, body).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        self.inner.response_headers(exchange, headers).await
    }

    async fn half_close(&self, _: &mut Exchange) -> Answer {
        self.open.fetch_sub(1, Relaxed);
        Ok(())
    }
}

/// GETs, small POSTs, and ones of which a part is spilled to a file. The EPP names the endpoint that is gone each time, and never
/// counts two requests for one.
#[tokio::test]
async fn request_that_no_endpoint_took_is_picked_once_more() {
    let (open, most) = (Arc::<AtomicI64>::default(), Arc::<AtomicI64>::default());
    let books = (Arc::clone(&open), Arc::clone(&most));
    let mut world =
        World::new(|gone, live| Books { inner: obeying(gone, live), open: books.0, most: books.1 }, |_| {}).await;
    let bodies = [json("m", 1000), json("m", 3 << 20)];
    let settled = || eventually(SOON, || open.load(Relaxed) == 0);
    for _ in 0..10 {
        settled().await;
        let seen = world.request(&Request::get("/test/echo")).await.echoed();
        assert_eq!(seen.body_length, 0);
        for body in &bodies {
            settled().await;
            let response = world.request(&echo(body.clone())).await;
            assert_eq!(response.served_by(), Some(world.live.addr));
            assert_eq!(response.echoed().body_hash, Fnv::of(body).value());
        }
    }
    assert_eq!(world.repicks("served"), (30, 30));
    eventually(SOON, || world.epp.streams_open() == 0).await;
    assert_eq!((open.load(Relaxed), most.load(Relaxed)), (0, 1), "an exchange began before the first had ended");
    assert_eq!(world.epp.streams_ended(StreamEnd::HalfClosed), 60);
    let streams = world.epp.streams();
    for exchanges in streams.chunks(2) {
        assert_eq!(exchanges[0].subset(), None);
        assert_eq!(exchanges[1].subset(), Some(vec![world.live.addr.to_string()]));
    }
    drop(world.gone);
}

/// With several requests at once.
#[tokio::test]
async fn concurrent_requests_are_each_picked_once_more() {
    let world = World::new(obeying, |_| {}).await;
    let one = async |number: usize| {
        let mut client = Client::connect(world.agent.addr).await.unwrap();
        let body = json("m", 1000 + number);
        assert_eq!(client.request(&echo(body.clone())).await.unwrap().echoed().body_hash, Fnv::of(&body).value());
    };
    futures_util::future::join_all((0..50).map(one)).await;
    assert_eq!(world.live.requests(), 50);
    eventually(SOON, || world.epp.streams_open() == 0).await;
}

#[tokio::test]
async fn picker_that_ignores_the_hint_is_asked_no_third_time() {
    let mut world = World::new(|gone, _| stubborn(gone), |_| {}).await;
    for requests in 1..=3 {
        let response = world.request(&echo(json("m", 1000))).await;
        assert_eq!((response.status(), response.error_code().as_str()), (502, "connect"));
        assert_eq!(world.epp.streams_started(), 2 * requests);
        assert_eq!(world.repicks("ignored"), (requests as u64, requests as u64));
    }
    eventually(SOON, || world.epp.streams_open() == 0).await;
    assert_eq!(world.live.requests(), 0);
}

#[tokio::test]
async fn second_pick_that_fails_is_final() {
    let other = Refusing::new().unwrap();
    let second = other.addr;
    let count = AtomicU64::new(0);
    let mut world = World::new(
        |gone, _| {
            let pick = move || if count.fetch_add(1, Relaxed) == 0 { gone } else { second };
            Answering::new(move |_| vec![reply::pick(&pick().to_string(), &[])])
        },
        |config| config.pools[0].endpoints.push(second.into()),
    )
    .await;
    assert_eq!(world.request(&echo(json("m", 1000))).await.status(), 502);
    assert_eq!((world.epp.streams_started(), world.repicks("failed")), (2, (1, 1)));
}

#[tokio::test]
async fn only_endpoint_is_not_picked_again() {
    let mut world = World::new(|gone, _| stubborn(gone), |config| config.pools[0].endpoints.truncate(1)).await;
    let response = world.request(&echo(json("m", 1000))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "connect"));
    assert_eq!((world.epp.streams_started(), world.repicks("none_left")), (1, (1, 1)));
}

/// Fields and body of the second pick apply to what the client sent.
#[tokio::test]
async fn second_mutation_applies_to_the_original_request() {
    let count = AtomicU64::new(0);
    let mut world = World::new(
        |gone, live| {
            Answering::new(move |exchange| {
                if count.fetch_add(1, Relaxed) == 0 {
                    let mut first = reply::pick(&gone.to_string(), &[("x-first", "1"), ("x-both", "1")]);
                    if let Some(penstock_proto::ext_proc::processing_response::Response::RequestHeaders(head)) =
                        &mut first.response
                    {
                        let mutation = head.response.as_mut().unwrap().header_mutation.as_mut().unwrap();
                        mutation.remove_headers.push("x-client".to_owned());
                    }
                    let replaced = bytes::Bytes::from_static(br#"{"model":"other"}"#);
                    return std::iter::once(first).chain(reply::request_body(&replaced)).collect();
                }
                // The second exchange shows the client's fields and body.
                assert!(exchange.request_headers.iter().all(|(name, _)| name != "x-first" && name != "x-both"));
                assert!(exchange.request_headers.iter().any(|(name, value)| name == "x-client" && value == "kept"));
                vec![reply::pick(&live.to_string(), &[("x-both", "2")])]
            })
        },
        |_| {},
    )
    .await;
    let body = json("m", 1000);
    let seen = world.request(&echo(body.clone()).header("x-client", "kept")).await.echoed();
    let field = |name: &str| -> Vec<&str> {
        seen.headers.iter().filter(|(field, _)| field == name).map(|(_, value)| value.as_str()).collect()
    };
    assert_eq!((field("x-first"), field("x-both"), field("x-client")), (vec![], vec!["2"], vec!["kept"]));
    assert_eq!(field("x-penstock-hop").len(), 1);
    assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(&body).value()));
    assert_eq!(world.epp.streams()[1].request_body().0, body);
}

/// Without a body, trailers or a change of the EPP, too.
#[tokio::test]
async fn reply_to_the_second_question_reaches_the_client() {
    let count = AtomicU64::new(0);
    let mut world = World::new(
        |gone, _| {
            Answering::new(move |_| match count.fetch_add(1, Relaxed) {
                0 => vec![reply::pick(&gone.to_string(), &[])],
                _ => vec![reply::immediate(429, &[], "queue full")],
            })
        },
        |_| {},
    )
    .await;
    let response = world.request(&echo(json("m", 1000))).await;
    assert_eq!((response.status(), response.text().as_str()), (429, "queue full"));
    assert_eq!(world.repicks("replied"), (1, 1));
}

#[tokio::test]
async fn failure_mode_applies_if_the_second_question_fails() {
    for (mode, status) in [(FailureMode::Open, 200), (FailureMode::Closed, 503)] {
        let count = AtomicU64::new(0);
        let mut world = World::new(
            |gone, _| {
                Answering::new(move |_| match count.fetch_add(1, Relaxed) {
                    0 => vec![reply::pick(&gone.to_string(), &[])],
                    _ => vec![reply::pick("no-address", &[])],
                })
            },
            |config| config.pools[0].failure_mode = mode,
        )
        .await;
        assert_eq!(world.request(&echo(json("m", 1000))).await.status(), status, "{mode:?}");
        assert_eq!(world.repicks("picker_failed").0, 1, "{mode:?}");
    }
}

/// The endpoint's kernel acknowledges the request before the endpoint closes.
#[tokio::test]
async fn request_that_may_have_been_processed_is_not_picked_again() {
    let closing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closing.local_addr().unwrap();
    let reads = tokio::spawn(async move {
        let (mut connection, _) = closing.accept().await.unwrap();
        connection.read_exact(&mut [0; 100]).await.unwrap();
    });
    let mut world = World::new(|_, _| stubborn(address), |config| config.pools[0].endpoints.push(address.into())).await;
    let response = world.request(&echo(json("m", 1000))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_closed"));
    assert_eq!((world.epp.streams_started(), world.repicks("served")), (1, (0, 0)));
    reads.await.unwrap();
}

/// With `passthrough` the agent knows the endpoints that have answered.
#[tokio::test]
async fn endpoints_seen_before_are_in_the_second_hint_of_a_pool_without_members() {
    let mut world = World::new(obeying, |config| {
        config.pools[0].endpoints.clear();
        config.pools[0].passthrough = Passthrough::Networks(vec![Network::parse("127.0.0.0/8").unwrap()]);
    })
    .await;
    // Nothing has been seen.
    assert_eq!(world.request(&echo(json("m", 1000))).await.status(), 502);
    assert_eq!(world.request(&echo(json("m", 1000))).await.served_by(), Some(world.live.addr));
    assert_eq!((world.epp.streams_started(), world.repicks("none_left")), (2, (1, 1)));
    assert_eq!(world.request(&echo(json("m", 1000))).await.served_by(), Some(world.live.addr));
    assert_eq!((world.epp.streams_started(), world.repicks("served")), (4, (1, 2)));
}

/// The endpoint of a lease may be gone, too.
#[tokio::test]
async fn request_under_a_lease_is_picked_if_its_endpoint_is_gone() {
    let mut two = ModelServer::start(Default::default()).await.unwrap();
    let address = two.addr;
    let mut world = World::new(
        |_, live| Production::new(&[address, live]),
        |config| {
            config.pools[0].pick_per = PickPer::Lease;
            config.pools[0].lease.requests = 100;
            config.pools[0].endpoints = [address, config.pools[0].endpoints[1].address].map(Into::into).into();
        },
    )
    .await;
    for _ in 0..3 {
        assert_eq!(world.request(&Request::get("/test/echo")).await.served_by(), Some(address));
    }
    assert_eq!(world.epp.streams_started(), 1, "the lease holds");
    two.stop();
    assert_eq!(world.request(&Request::get("/test/echo")).await.served_by(), Some(world.live.addr));
    assert_eq!((world.epp.streams_started(), world.repicks("served")), (2, (1, 1)));
}

/// After enough failures the endpoint is not in the first hint either, until it may be probed.
#[tokio::test]
async fn ejected_endpoint_is_left_out_of_the_hint() {
    let mut world = World::new(obeying, |config| {
        config.pools[0].ejection.failures = 2;
        config.pools[0].ejection.base = std::time::Duration::from_secs(600);
        config.pools[0].ejection.max = std::time::Duration::from_secs(600);
    })
    .await;
    for _ in 0..10 {
        assert_eq!(world.request(&echo(json("m", 1000))).await.served_by(), Some(world.live.addr));
    }
    assert_eq!((world.epp.streams_started(), world.repicks("served")), (12, (2, 2)));
    let hint = Some(vec![world.live.addr.to_string()]);
    assert!(world.epp.streams()[4..].iter().all(|stream| stream.subset() == hint));
}

/// A client that leaves while the first exchange ends is noticed, and a picker that does not close its stream delays by a second.
#[tokio::test]
async fn picker_that_keeps_its_stream_open_delays_the_second_question_only_for_a_while() {
    let hangs = Fault::At(Moment::ResponseHeaders, Harm::Close);
    struct Open<S>(S);
    #[tonic::async_trait]
    impl<S: Script> Script for Open<S> {
        async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
            self.0.request_headers(exchange, headers).await
        }

        async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
            self.0.request_body(exchange, body).await
        }

        async fn half_close(&self, _: &mut Exchange) -> Answer {
            std::future::pending().await
        }
    }
    let mut world = World::new(|gone, live| Open(Faulty::new(obeying(gone, live), hangs)), |_| {}).await;
    assert_eq!(world.request(&echo(json("m", 1000))).await.served_by(), Some(world.live.addr));
    let streams = world.epp.streams();
    assert_eq!((streams.len(), streams[0].end), (2, Some(StreamEnd::Cancelled)));
}
