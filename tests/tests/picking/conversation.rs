//! The messages that the picker gets, and when.

use penstock_proto::ext_proc::{BodySendMode, processing_request::Request as Told};
use penstock_tests::{
    Client, Plan, Request, Stage,
    client::{Pace, Piece},
    content::Fnv,
    eventually,
    scripted_epp::{Production, StreamEnd, header},
    stage::{echo, json},
};

use crate::SOON;

#[tokio::test]
async fn request_head_carries_pseudo_headers() {
    let mut stage = Stage::new(Production::new).await;
    stage.request(&echo(r#"{"model":"m"}"#).header("host", "models.example").header("x-own", "1")).await;
    let told = stage.epp.streams()[0].request_headers();
    let expected = [
        (":method", "POST"),
        (":path", "/test/echo"),
        (":scheme", "http"),
        (":authority", "models.example"),
        ("x-own", "1"),
        ("content-length", "13"),
    ];
    for (name, value) in expected {
        assert_eq!(header(&told, name), Some(value), "{name}");
    }
    assert!(header(&told, "x-request-id").is_some_and(|id| !id.is_empty()));
    assert!(told.iter().all(|(name, _)| *name == name.to_lowercase()));
}

/// E2: full duplex in both directions, without waiting for the reply to the headers.
#[tokio::test]
async fn only_first_message_carries_body_mode() {
    let mut stage = Stage::new(Production::new).await;
    stage.request(&echo(json("m", 200_000))).await;
    let stream = &stage.epp.streams()[0];
    let first = stream.protocol_config().unwrap();
    let duplex = i32::from(BodySendMode::FullDuplexStreamed);
    assert_eq!((first.request_body_mode, first.response_body_mode), (duplex, duplex));
    assert!(first.send_body_without_waiting_for_header_response);
    assert!(stream.messages.len() > 4 && stream.messages[1..].iter().all(|message| message.protocol_config.is_none()));
}

/// GET and other methods without a body.
#[tokio::test]
async fn request_without_body_ends_with_head_and_is_served() {
    let mut stage = Stage::new(Production::new).await;
    for (turn, request) in
        [Request::get("/test/echo"), Request::new("DELETE", "/test/echo"), echo("")].iter().enumerate()
    {
        let response = stage.request(request).await;
        assert_eq!((response.status(), response.echoed().body_length), (200, 0));
        assert!(response.served_by().is_some());
        let stream = &stage.epp.streams()[turn];
        let Some(Told::RequestHeaders(head)) = &stream.messages[0].request else { panic!("{:?}", stream.kinds()) };
        assert!(head.end_of_stream, "{request:?}");
    }
    let stream = &stage.epp.streams()[0];
    let Some(Told::RequestHeaders(head)) = &stream.messages[0].request else { panic!("{:?}", stream.kinds()) };
    assert!(head.end_of_stream);
    assert!(!stream.kinds().contains(&"request_body"));
}

/// E1: the whole body with one end.
#[tokio::test]
async fn request_body_reaches_picker_in_pieces_with_one_end() {
    let mut stage = Stage::new(Production::new).await;
    let body = json("m", 1 << 20);
    stage.request(&echo(body.clone())).await;
    let stream = &stage.epp.streams()[0];
    assert!(stream.request_body() == (body, 1), "expected the whole body and one end");
    for message in &stream.messages {
        match &message.request {
            Some(Told::RequestBody(piece)) => assert!(piece.body.len() <= 256 << 10, "{}", piece.body.len()),
            Some(Told::RequestHeaders(head)) => assert!(!head.end_of_stream),
            _ => {}
        }
    }
}

/// E2: the picker gets what has arrived while the client still uploads.
#[tokio::test]
async fn request_body_reaches_picker_during_upload() {
    let mut stage = Stage::new(Production::new).await;
    let body = json("m", 300_000);
    let wire = echo(body.clone()).wire("agent");
    let (begin, rest) = wire.split_at(150_000);
    stage.client.send_raw(begin).await.unwrap();
    // Everything sent except the head.
    let uploaded = body.len() - rest.len();
    let epp = &stage.epp;
    eventually(SOON, || {
        epp.streams().first().is_some_and(|stream| stream.request_body() == (body[..uploaded].to_vec(), 0))
    })
    .await;
    stage.client.send_raw(rest).await.unwrap();
    assert_eq!(stage.client.response().await.unwrap().echoed().body_hash, Fnv::of(&body).value());
}

/// E7, E8: head, served endpoint, and the end.
#[tokio::test]
async fn response_head_names_served_endpoint() {
    let mut stage = Stage::new(Production::new).await;
    let plan = Plan { status: 201, size: 100_000, ..Plan::default() };
    let response = stage.request(&plan.request()).await;
    plan.checker().feed(&response.body).unwrap();
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
    let stream = &stage.epp.streams()[0];
    assert_eq!(stream.kinds(), ["request_headers", "response_headers", "response_body"]);
    assert_eq!(header(&stream.response_headers(), ":status"), Some("201"));
    assert_eq!(stream.response_body(), (Vec::new(), 1));
    assert_eq!(stream.served(), Some(stage.one.addr.to_string()));
    assert_eq!(stage.epp.streams_open(), 0);
}

/// E7: the stream lives as long as the response.
#[tokio::test]
async fn picker_stream_stays_open_during_response() {
    let stage = Stage::new(Production::new).await;
    // Larger than all buffers in between, so that it flows only as the client reads.
    let plan = Plan { size: 32 << 20, ..Plan::default() };
    let mut client = Client::connect_with(stage.agent.addr, Some(64 << 10)).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    let Piece::Data(first) = client.piece(1000).await.unwrap() else { panic!("no body") };
    eventually(SOON, || stage.epp.streams()[0].kinds() == ["request_headers", "response_headers"]).await;
    assert_eq!(stage.epp.streams_open(), 1);
    assert_eq!(stage.agent.metric("penstock_active_requests", &[]), 1.0);
    let mut checker = plan.checker();
    checker.feed(&first).unwrap();
    client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!(checker.offset(), plan.size);
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == 1).await;
}

/// E19: the picker closes its streams with status OK after each pick.
#[tokio::test]
async fn picker_closing_before_response_is_no_failure() {
    let mut stage = Stage::new(|all| Production::new(all).skipping_response()).await;
    for _ in 0..3 {
        assert_eq!(stage.request(&echo(json("m", 1000))).await.status(), 200);
    }
    assert_eq!(stage.epp.streams_ended(StreamEnd::Script), 3);
    assert!(stage.epp.connections_accepted() <= stage.workers(), "{}", stage.epp.connections_accepted());
}

/// E20: the picker's death cuts no running response.
#[tokio::test]
async fn picker_death_during_response_cuts_nothing() {
    let mut stage = Stage::new(Production::new).await;
    let plan = Plan { size: 32 << 20, ..Plan::default() };
    let mut client = Client::connect_with(stage.agent.addr, Some(64 << 10)).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    stage.epp.stop();
    let mut checker = plan.checker();
    client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
    assert_eq!(checker.offset(), plan.size);
    stage.epp.restart().await.unwrap();
    eventually(SOON, || stage.epp.connections_open() == stage.workers()).await;
    assert_eq!(stage.request(&echo(r#"{"model":"m"}"#)).await.status(), 200);
}
