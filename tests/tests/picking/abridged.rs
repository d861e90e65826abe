//! `body_to_picker = "abridged"`: the picker gets the beginning of a long body, and the endpoint the client's own body, with the
//! model that the picker chose.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering::Relaxed},
};

use bytes::Bytes;
use penstock_agent::config::{BodyToPicker, Config, FailureMode, PickPer};
use penstock_tests::{
    Client, Http2Client, Refusing, Request, Stage,
    content::{Alphabet, Fnv},
    eventually,
    model_server::Echo,
    scripted_epp::{
        Answering, Dynamo, Endpoints, Fault, Faulty, Gie, Harm, LlmdRouter, Lwepp, Moment, Personality, Production,
        header, reply,
    },
    stage::{echo, epp, json},
};
use serde_json::{Value, json};

use crate::{SOON, gone::Books};

/// Bytes of strings that the picker gets.
const LIMIT: usize = 4096;
const LENGTH: &str = "x-penstock-body-length";

fn abridging(config: &mut Config) {
    epp(config).body_to_picker = BodyToPicker::Abridged;
    epp(config).body_to_picker_bytes = LIMIT;
}

/// A conversation of about `len` bytes. The model is behind the messages.
fn chat(len: usize) -> String {
    let text = String::from_utf8(Alphabet::Text.bytes(3, 0, len)).unwrap();
    format!(
        "{{ \"messages\" : [{{\"role\":\"user\",\"content\":\"{text}\\n\\u00e9\"}}],\n \"model\":\"m\", \"stream\": false, \
         \"temperature\":0.5, \"stop\":[\"\\u003c/s\"] }}"
    )
}

/// The requests with this body that a client may send; the last goes over HTTP/2.
async fn sent_in_every_form(stage: &mut Stage, body: &str) -> Vec<Echo> {
    let hostile = |request: Request| request.header(LENGTH, "1").header("x_penstock_body_length", "2");
    let plain = hostile(echo(body.to_owned())).header("content-md5", "x").header("digest", "sha-256=x");
    let chunked = hostile(echo("")).chunked(body.to_owned(), 7777);
    let mut echoes = Vec::new();
    for request in [&plain, &plain.clone().header("expect", "100-continue"), &chunked] {
        echoes.push(stage.request(request).await.echoed());
    }
    let mut client = Http2Client::connect(stage.agent.addr).await.unwrap();
    echoes.push(client.request(&plain).await.unwrap().echoed());
    echoes
}

/// How many requests with long bodies had this outcome.
fn outcome(stage: &Stage, outcome: &str) -> u64 {
    stage.agent.count("penstock_epp_long_bodies_total", &[&format!("reason=\"{outcome}\"")])
}

fn assert_endpoint_got(seen: &Echo, body: &str, what: &str) {
    assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(body.as_bytes()).value()), "{what}");
    assert_eq!(seen.header(LENGTH), None, "{what}");
    assert_eq!(seen.header("x_penstock_body_length"), None, "{what}");
}

/// Checks what the picker was told about every request.
fn assert_picker_got_less(stage: &Stage, whole: &str, what: &str) {
    for stream in stage.epp.streams() {
        let (seen, ends) = stream.request_body();
        assert_eq!(ends, 1);
        assert!(seen.len() > LIMIT && seen.len() < LIMIT + 500, "{what}: {} bytes", seen.len());
        let seen_document: Value = serde_json::from_slice(&seen).expect("JSON");
        let mut document: Value = serde_json::from_str(whole).unwrap();
        let text = seen_document["messages"][0]["content"].as_str().unwrap();
        assert!(document["messages"][0]["content"].as_str().unwrap().starts_with(text));
        document["messages"][0]["content"] = json!(text);
        assert_eq!(seen_document, document, "{what}");
        let fields = stream.request_headers();
        assert_eq!(header(&fields, LENGTH), Some(&*whole.len().to_string()), "{what}");
        assert!(header(&fields, "content-length").is_none_or(|length| length == seen.len().to_string()), "{what}");
        assert_eq!(header(&fields, "content-md5"), None);
        assert!(!fields.iter().any(|(name, _)| name == "x_penstock_body_length"));
    }
}

/// With bodies in memory and in files.
async fn client_body_reaches_the_endpoint<P: Personality>(what: &str) {
    for memory in [0, 1 << 20] {
        let mut stage = Stage::with(
            |endpoints| P::over(Endpoints::new(endpoints)),
            |config| {
                abridging(config);
                config.limits.body_memory_bytes = memory;
            },
        )
        .await;
        let body = chat(300_000);
        let echoes = sent_in_every_form(&mut stage, &body).await;
        for seen in &echoes {
            assert_endpoint_got(seen, &body, what);
        }
        assert_eq!(echoes.iter().filter(|seen| seen.header("content-md5") == Some("x")).count(), 3, "{what}");
        assert_picker_got_less(&stage, &body, what);
        assert_eq!((outcome(&stage, "unchanged"), stage.epp.streams_started()), (4, 4), "{what}");
        let memory = || stage.agent.count("penstock_request_body_memory_bytes", &[]);
        eventually(SOON, || memory() == 0).await;
        // As long as the limit: as if nothing were abridged.
        let short = json("m", LIMIT - 40);
        assert_eq!(stage.request(&echo(short.clone())).await.echoed().body_hash, Fnv::of(&short).value());
        let stream = stage.epp.streams().pop().unwrap();
        assert_eq!((stream.request_body().0, header(&stream.request_headers(), LENGTH)), (short, None));
    }
}

#[tokio::test]
async fn picker_gets_less_and_endpoint_the_clients_body() {
    client_body_reaches_the_endpoint::<LlmdRouter>("llm-d's router").await;
    // Marshals anew: other order, white space, escapes and length.
    client_body_reaches_the_endpoint::<Gie>("GIE v1.5").await;
    client_body_reaches_the_endpoint::<Lwepp>("lwepp").await;
}

async fn model_is_changed_in_the_clients_body<P: Personality>(what: &str) {
    let name = "inner \"é\"";
    let mut stage = Stage::with(
        |endpoints| P::over(Endpoints::new(endpoints)).rewriting(name),
        |config| {
            abridging(config);
            config.limits.body_memory_bytes = 100_000;
        },
    )
    .await;
    let body = chat(300_000);
    let expected = body.replacen(r#""model":"m""#, r#""model":"inner \"é\"""#, 1);
    for seen in sent_in_every_form(&mut stage, &body).await {
        assert_endpoint_got(&seen, &expected, what);
        assert_eq!((seen.header("content-md5"), seen.header("digest")), (None, None), "digests of another body");
    }
    assert_picker_got_less(&stage, &body, what);
    assert_eq!((outcome(&stage, "renamed"), stage.epp.streams_started()), (4, 4), "{what}");
}

#[tokio::test]
async fn changed_model_is_changed_in_the_clients_body() {
    model_is_changed_in_the_clients_body::<LlmdRouter>("llm-d's router").await;
    model_is_changed_in_the_clients_body::<Gie>("GIE v1.5").await;
}

/// The answer carries the client's name.
#[tokio::test]
async fn changed_model_is_changed_back_in_the_answer() {
    let mut stage = Stage::with(|endpoints| Production::new(endpoints).rewriting("inner"), abridging).await;
    let request = Request::post("/v1/chat/completions", chat(100_000)).header("content-type", "application/json");
    let answer: Value = stage.request(&request).await.json().unwrap();
    assert_eq!(answer["model"], "m");
    assert_eq!(outcome(&stage, "renamed"), 1);
}

/// Replaces a member of the body that it got, whatever it got.
fn meddling(endpoint: &str) -> Answering {
    let endpoint = endpoint.to_owned();
    Answering::new(move |exchange| {
        let mut document: Value = serde_json::from_slice(&exchange.request_body).unwrap();
        document["max_tokens"] = json!(7);
        let body = Bytes::from(document.to_string());
        [reply::pick(&endpoint, &[])].into_iter().chain(reply::request_body(&body)).collect()
    })
}

#[tokio::test]
async fn rewriting_picker_is_asked_again_with_the_whole_body() {
    let (open, most) = (Arc::<AtomicI64>::default(), Arc::<AtomicI64>::default());
    let books = (Arc::clone(&open), Arc::clone(&most));
    let script = |endpoints: &[std::net::SocketAddr]| {
        let inner = meddling(&endpoints[0].to_string());
        Books { inner, open: books.0, most: books.1 }
    };
    let mut stage = Stage::with(script, abridging).await;
    let body = chat(300_000);
    let mut changed: Value = serde_json::from_str(&body).unwrap();
    changed["max_tokens"] = json!(7);
    let changed = changed.to_string();
    let mut streams = 0;
    for (rewritten, known, reload) in [(1, 0, false), (1, 1, false), (1, 2, true), (2, 2, false)] {
        let seen = stage.request(&echo(body.clone())).await.echoed();
        assert_endpoint_got(&seen, &changed, "rewritten");
        assert_eq!((outcome(&stage, "rewritten"), outcome(&stage, "rewriter")), (rewritten, known));
        streams = stage.epp.streams_started();
        assert_eq!(streams as u64, 2 * rewritten + known);
        let whole = stage.epp.streams().pop().unwrap();
        assert_eq!(
            (whole.request_body().0, header(&whole.request_headers(), LENGTH)),
            (body.clone().into_bytes(), None)
        );
        eventually(SOON, || open.load(Relaxed) == 0).await;
        if reload {
            let mut config = stage.agent.config();
            config.limits.head_bytes += 1;
            stage.agent.agent.reload(config).unwrap();
            // A connection keeps the configuration of its worker until that has got the new one.
            stage.client = Client::connect(stage.agent.addr).await.unwrap();
        }
    }
    assert_eq!(streams, 6);
    assert_eq!(most.load(Relaxed), 1, "a request was counted twice");
}

/// The endpoint gets this picker's rewriting of the whole body.
async fn rewriting_reaches_the_endpoint<P: Personality>(body: &str, what: &str) {
    let mut stage = Stage::with(|endpoints| P::over(Endpoints::new(endpoints)), abridging).await;
    let seen = stage.request(&echo(body.to_owned())).await.echoed();
    assert_endpoint_got(&seen, &String::from_utf8(P::sent_on(body.as_bytes(), None)).unwrap(), what);
    assert_eq!(outcome(&stage, "rewritten"), 1, "{what}");
}

/// Numbers count by their text: an endpoint may read 0.50 otherwise than 0.5.
#[tokio::test]
async fn other_changes_of_the_picker_reach_the_endpoint() {
    rewriting_reaches_the_endpoint::<Gie>(&chat(50_000).replace("0.5", "0.50"), "another number").await;
    rewriting_reaches_the_endpoint::<Dynamo>(&chat(50_000), "another member").await;
}

#[tokio::test]
async fn body_that_cannot_be_abridged_is_sent_whole() {
    let mut stage = Stage::with(Production::new, abridging).await;
    let long = "x".repeat(LIMIT);
    let numbers = format!(r#"{{"model":"m","n":[{}1],"x":"{long}{long}"}}"#, "1,".repeat(LIMIT));
    let both = format!(r#"{{"model":"m","n":[{}1],"x":"{}"}}"#, "1,".repeat(LIMIT / 4), &long[..LIMIT / 2 + 600]);
    let rows = [
        ("text/plain", "", long.clone() + &long, "not_json"),
        ("application/json", "br", chat(LIMIT), "coded"),
        ("application/json", "", numbers, "structure"),
        ("application/json", "", both, "short"),
    ];
    for (content, coding, body, why) in rows {
        let mut request = Request::post("/test/echo", body.clone()).header("content-type", content);
        if !coding.is_empty() {
            request = request.header("content-encoding", coding);
        }
        // The picker refuses what it cannot read; it must have got all of it.
        stage.request(&request).await;
        let stream = stage.epp.streams().pop().unwrap();
        assert_eq!(stream.request_body().0, body.as_bytes(), "{why}");
        assert_eq!(header(&stream.request_headers(), LENGTH), None, "{why}");
        assert_eq!(outcome(&stage, why), 1, "{why}");
    }
}

#[tokio::test]
async fn body_for_which_there_is_no_memory_is_sent_whole() {
    let mut stage = Stage::with(Production::new, |config| {
        abridging(config);
        epp(config).body_to_picker_bytes = 200_000;
        config.limits.total_body_bytes = 100_000;
    })
    .await;
    let body = chat(500_000);
    assert_endpoint_got(&stage.request(&echo(body.clone())).await.echoed(), &body, "no memory");
    assert_eq!(outcome(&stage, "memory"), 1);
}

/// A pick is held although the picker was told another length.
#[tokio::test]
async fn abridged_request_gives_a_lease_and_a_pin() {
    for pick_per in [PickPer::Lease, PickPer::Connection] {
        let mut stage = Stage::with(Production::new, |config| {
            abridging(config);
            config.pools[0].pick_per = pick_per;
        })
        .await;
        let body = chat(100_000);
        for _ in 0..3 {
            assert_endpoint_got(&stage.request(&echo(body.clone())).await.echoed(), &body, "held");
        }
        assert_eq!((outcome(&stage, "unchanged"), stage.epp.streams_started()), (1, 1));
    }
}

#[tokio::test]
async fn pool_fails_open_with_the_clients_body() {
    for moment in [Moment::RequestHeaders, Moment::RequestBody(0)] {
        let mut stage = Stage::with(
            |endpoints| Faulty::new(Production::new(endpoints), Fault::At(moment, Harm::ResetConnection)),
            |config| {
                abridging(config);
                config.pools[0].failure_mode = FailureMode::Open;
            },
        )
        .await;
        let body = chat(100_000);
        assert_endpoint_got(&stage.request(&echo(body.clone())).await.echoed(), &body, "failed open");
        assert_eq!(outcome(&stage, "undecided"), 1);
    }
}

/// An endpoint of the pick is gone: the second pick is about the abridged body as well, and the model is changed in the client's.
#[tokio::test]
async fn second_pick_is_abridged_too() {
    let gone = Refusing::new().unwrap();
    let mut stage = Stage::with(
        |endpoints| Production::new(&[gone.addr, endpoints[0]]).rewriting("inner"),
        |config| {
            abridging(config);
            config.pools[0].endpoints.push(gone.addr.into());
            config.pools[0].ejection.failures = 0;
        },
    )
    .await;
    let body = chat(2 << 20);
    let expected = body.replacen(r#""model":"m""#, r#""model":"inner""#, 1);
    for _ in 0..4 {
        assert_endpoint_got(&stage.request(&echo(body.clone())).await.echoed(), &expected, "picked again");
    }
    assert_picker_got_less(&stage, &body, "picked again");
    let repicked = stage.agent.count("penstock_epp_repicks_total", &["reason=\"served\""]);
    assert!(repicked > 0);
    assert_eq!(outcome(&stage, "renamed"), 4 + repicked);
}

/// A client that leaves while it uploads leaves nothing behind; and the picker has not been asked.
#[tokio::test]
async fn client_that_leaves_while_it_uploads_is_forgotten() {
    let stage = Stage::with(Production::new, abridging).await;
    let request = echo(json("m", 100_000)).piecewise(50_000, std::time::Duration::from_secs(3600));
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    let active = || stage.agent.count("penstock_active_requests", &[]);
    tokio::select! {
        _ = client.request(&request) => panic!("answered"),
        () = eventually(SOON, || active() == 1) => {}
    }
    drop(client);
    let memory = || stage.agent.count("penstock_request_body_memory_bytes", &[]);
    eventually(SOON, || active() == 0 && memory() == 0).await;
    assert_eq!(stage.epp.streams_started(), 0);
}
