//! Evictions in every moment of a request, for clients of every protocol, in every steering mode and framing. Before the head has gone
//! out, the client gets the EPP's response; after it, the response fails visibly. The endpoint's request ends at once either way.

use std::sync::Arc;

use penstock_agent::config::{FailureMode, ResponseToPicker, SteeringMode};
use penstock_tests::{
    BodyEnd, Client, Plan, Request, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    client::Piece,
    eventually,
    model_server::{Fault, FaultKind, Framing, HeadWrites, Lengths, Pauses},
    scripted_epp::{Answering, EvictAfter, Evicting, LlmdRouter, StreamEnd, reply},
    stage::epp,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

use crate::{
    SOON,
    scene::{Asker, Back, FRAMINGS, Front, Scene, WAYS},
};

/// A body in small pieces that does not end before it is evicted.
fn endless(framing: Framing) -> Plan {
    Plan {
        framing,
        size: 1 << 30,
        stream_id: 7,
        writes: Lengths::Fixed(1000),
        pauses: Some(Pauses { seed: 7, every: 1, up_to_us: 500 }),
        ..Plan::default()
    }
}

/// A head, and no byte of its body.
fn silent(framing: Framing) -> Plan {
    Plan { fault: Some(Fault { after: 0, kind: FaultKind::Stall }), ..endless(framing) }
}

/// No byte of a response.
fn thinking(framing: Framing) -> Plan {
    Plan {
        head: HeadWrites { split_at: Some(0), pause_us: 3_600_000_000, ..HeadWrites::default() },
        ..endless(framing)
    }
}

async fn scene(way: (Front, SteeringMode), after: EvictAfter, told: ResponseToPicker, now: &Arc<Notify>) -> Scene {
    let evicting = |all: &[_]| Evicting { inner: LlmdRouter::new(all), after, now: Arc::clone(now) };
    Scene::with(way.0, Back::Http1, evicting, |config| {
        config.steering.mode = way.1;
        epp(config).response_to_picker = told;
    })
    .await
}

/// The request has ended everywhere, and is counted with its status.
async fn ended(scene: &Scene, status: u16, what: &str) {
    eventually(SOON, || scene.endpoint.aborted() == 1).await;
    eventually(SOON, || scene.epp.streams_ended(StreamEnd::Script) == 1).await;
    assert_eq!(scene.agent.count("penstock_evictions_total", &[]), 1, "{what}");
    let labels = ["reason=\"evicted\"".to_owned(), format!("status=\"{status}\"")];
    let labels: Vec<_> = labels.iter().map(String::as_str).collect();
    eventually(SOON, || scene.agent.count("penstock_requests_total", &labels) == 1).await;
}

#[tokio::test]
async fn eviction_before_the_head_is_the_response() {
    for way in WAYS {
        let now = Arc::new(Notify::new());
        let scene = scene(way, EvictAfter::Pick, ResponseToPicker::Usage, &now).await;
        let mut client = scene.client().await;
        client.send(&thinking(Framing::Chunked).request()).await.unwrap();
        eventually(SOON, || scene.endpoint.requests() == 1).await;
        now.notify_one();
        let what = format!("{way:?}");
        let head = client.head().await.unwrap();
        assert_eq!((head.status, head.header("x-llm-d-request-dropped-reason")), (429, Some("evicted")), "{what}");
        let mut body = Vec::new();
        let read = client.read_body(|bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        let read = read.await.unwrap();
        assert_eq!((read.end, body.as_slice()), (BodyEnd::Complete, &b"request evicted by flow control"[..]), "{what}");
        ended(&scene, 429, &what).await;
        // The connection of the client stays.
        client.send(&Request::get("/test/echo")).await.unwrap();
        eventually(SOON, || scene.endpoint.requests() == 2).await;
    }
}

#[tokio::test]
async fn eviction_after_the_head_fails_visibly_in_every_framing() {
    for way in WAYS {
        for framing in FRAMINGS {
            for (plan, told) in
                [(endless(framing), ResponseToPicker::Usage), (silent(framing), ResponseToPicker::Headers)]
            {
                let what = format!("{way:?} {framing:?} {told:?}");
                let now = Arc::new(Notify::new());
                let scene = scene(way, EvictAfter::ResponseHead, told, &now).await;
                let mut client = scene.client().await;
                client.send(&plan.request()).await.unwrap();
                assert_eq!(client.head().await.unwrap().status, 200, "{what}");
                let mut checker = plan.checker();
                while plan.fault.is_none() && checker.offset() < 20_000 {
                    let Piece::Data(data) = client.piece().await.unwrap() else { panic!("{what}: ended early") };
                    checker.feed(&data).unwrap();
                }
                now.notify_one();
                let read = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
                assert_ne!(read.end, BodyEnd::Complete, "{what}");
                if framing == Framing::UntilClose && way.0 == Front::Http1 {
                    assert_eq!(read.end, BodyEnd::Reset, "{what}");
                }
                ended(&scene, 200, &what).await;
            }
        }
    }
}

/// Whatever the EPP is told of the response, also if that is nothing.
#[tokio::test]
async fn eviction_is_obeyed_whatever_the_picker_is_told() {
    for told in [ResponseToPicker::Off, ResponseToPicker::Headers, ResponseToPicker::Usage, ResponseToPicker::Body] {
        // In mode `off` the picker does not learn that there is a response.
        let after = if told == ResponseToPicker::Off { EvictAfter::Pick } else { EvictAfter::ResponseHead };
        let what = format!("{told:?}");
        let now = Arc::new(Notify::new());
        let scene = scene((Front::Http1, SteeringMode::Auto), after, told, &now).await;
        let mut client = scene.client().await;
        let plan = endless(Framing::Chunked);
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200, "{what}");
        now.notify_one();
        let mut checker = plan.checker();
        let read = client.read_body(|bytes| Ok(checker.feed(bytes)?)).await.unwrap();
        assert_ne!(read.end, BodyEnd::Complete, "{what}");
        ended(&scene, 200, &what).await;
    }
}

/// The agent relays such a body in frames, because it restores the model's name; only the close ends it.
#[tokio::test]
async fn renamed_body_until_close_never_ends_cleanly_when_cut() {
    for evicts in [true, false] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        let cut = Arc::new(Notify::new());
        let endpoint_cut = Arc::clone(&cut);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let cut = Arc::clone(&endpoint_cut);
                tokio::spawn(async move { until_close(&mut stream, (!evicts).then_some(cut)).await });
            }
        });
        let now = Arc::new(Notify::new());
        let evicting = Arc::clone(&now);
        let renaming = Answering::new(move |exchange| {
            let body = String::from_utf8(exchange.request_body.clone()).unwrap().replace("alias", "inner");
            let body = body.into_bytes().into();
            [reply::pick(&endpoint.to_string(), &[])].into_iter().chain(reply::request_body(&body)).collect()
        });
        let script = Evicting { inner: renaming, after: EvictAfter::ResponseHead, now: evicting };
        let picker = ScriptedEpp::start(script).await.unwrap();
        let pool = epp_pool(&[endpoint], picker.addr, FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |_| {});
        let mut client = Asker::Http1(Client::connect(agent.addr).await.unwrap());
        let request =
            Request::post("/v1/completions", r#"{"model":"alias"}"#).header("content-type", "application/json");
        client.send(&request).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let Piece::Data(data) = client.piece().await.unwrap() else { panic!("ended early") };
        assert!(String::from_utf8_lossy(&data).contains("alias"), "{data:?}");
        if evicts {
            now.notify_one();
        } else {
            cut.notify_one();
        }
        assert_eq!(client.read_body(|_| Ok(())).await.unwrap().end, BodyEnd::Reset, "evicts: {evicts}");
        assert_eq!(agent.count("penstock_flows_total", &["reason=\"model_renamed\""]), 1);
    }
}

/// Answers one request with an event whose body only the close ends, and resets when it is told to.
async fn until_close(stream: &mut TcpStream, cut: Option<Arc<Notify>>) {
    let mut read = Vec::new();
    while !read.ends_with(b"}") {
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: {\"model\":\"inner\"}\n\n";
    stream.write_all(answer).await.unwrap();
    match cut {
        Some(cut) => {
            cut.notified().await;
            let _ = stream.set_zero_linger();
        }
        // Until the agent has left.
        None => drop(stream.read_buf(&mut read).await),
    }
}
