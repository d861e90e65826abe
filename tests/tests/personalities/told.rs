//! `response_to_picker`: what the picker is told about response bodies, in step with what the client gets.

use penstock_agent::config::{ResponseToPicker, SteeringMode};
use penstock_common::tail::TAIL;
use penstock_proto::ext_proc::processing_request::Request as Told;
use penstock_tests::{
    BodyEnd, Client, Plan, Random, Request, Response, Stage,
    client::Pace,
    eventually,
    model_server::{Fault as ServerFault, FaultKind, Framing, Lengths, Pauses},
    scripted_epp::{
        Endpoints, Fault, Faulty, Gie, Harm, LlmdRouter, Moment, Personality, Script, StreamEnd, StreamRecord,
    },
    stage::epp,
};

use crate::SOON;

async fn stage<S: Script>(
    script: impl FnOnce(&[std::net::SocketAddr]) -> S,
    told: ResponseToPicker,
    steering: SteeringMode,
) -> Stage {
    Stage::with(script, |config| {
        config.steering.mode = steering;
        epp(config).response_to_picker = told;
    })
    .await
}

/// A streamed completion with its usage.
fn completion(tokens: u32, interval_us: u32) -> Request {
    let body = format!(
        r#"{{"model":"m","stream":true,"stream_options":{{"include_usage":true}},"max_tokens":{tokens},"x-test-interval-us":{interval_us},"prompt":"five words of a prompt"}}"#
    );
    Request::post("/v1/completions", body).header("content-type", "application/json")
}

/// The first event, and the complete events within the last bytes of the client's body.
fn first_and_last_events(body: &[u8]) -> Vec<u8> {
    first_and_last(std::str::from_utf8(body).unwrap()).into_bytes()
}

/// The same of a text.
pub(crate) fn first_and_last(text: &str) -> String {
    let first = text.find("\n\n").unwrap() + 2;
    let cut = text.len().saturating_sub(TAIL as usize);
    if cut <= first {
        return text.to_owned();
    }
    [&text[..first], text[cut..].split_once("\n\n").unwrap().1].concat()
}

/// The streams, after all have closed orderly.
async fn ended(stage: &Stage, streams: usize) -> Vec<StreamRecord> {
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::HalfClosed) == streams).await;
    stage.epp.streams()
}

fn tokens(stage: &Stage, kind: &str) -> u64 {
    let labels = [r#"pool="default""#, r#"gen_ai_response_model="m""#, &format!("gen_ai_token_type=\"{kind}\"")];
    stage.agent.count("penstock_gen_ai_client_inference_tokens_total", &labels)
}

fn relayed_for_the_picker(stage: &Stage) -> u64 {
    stage.agent.count("penstock_flows_total", &[r#"path="relay""#, r#"reason="response_to_picker""#])
}

/// Relayed responses whose body the picker answered for.
fn returned_by_picker(stage: &Stage) -> u64 {
    stage.agent.count("penstock_flows_total", &[r#"path="relay""#, r#"reason="picker_body""#])
}

/// Relayed responses that were reported, whether the body came after its head or, on a busy machine, together with it.
fn relayed_and_told(stage: &Stage) -> u64 {
    relayed_for_the_picker(stage) + stage.agent.count("penstock_flows_total", &[r#"reason="complete""#])
}

fn steered(stage: &Stage) -> u64 {
    stage.agent.steered()
}

async fn last_events_are_told<P: Personality>(mode: SteeringMode) {
    let mut stage = stage(|all| P::over(Endpoints::new(all)), ResponseToPicker::Usage, mode).await;
    // From streams long enough to be steered to ones that arrive at once and are shorter than the tail.
    let streams = [(200, 1000), (200, 0), (5, 1000), (3, 0), (1500, 50), (100, 2000)];
    for (number, (count, interval)) in streams.into_iter().enumerate() {
        let response = stage.request(&completion(count, interval)).await;
        assert_eq!(response.read.end, BodyEnd::Complete);
        let told = ended(&stage, number + 1).await[number].response_body();
        let expected = first_and_last_events(&response.body);
        assert!(expected.ends_with(b"data: [DONE]\n\n") && expected.windows(7).any(|window| window == b"\"usage\""));
        assert_eq!(String::from_utf8_lossy(&told.0), String::from_utf8_lossy(&expected), "{count} {interval}");
        assert_eq!(told.1, 1);
    }
    let output: u32 = streams.iter().map(|(count, _)| count).sum();
    assert_eq!((tokens(&stage, "input"), tokens(&stage, "output")), (5 * streams.len() as u64, u64::from(output)));
    assert_eq!(steered(&stage) > 0, mode != SteeringMode::Off);
    assert_eq!(relayed_for_the_picker(&stage), 0);
}

/// E7: with `usage`, the picker is told a steered stream's first and last events, without chunk sizes.
#[tokio::test]
async fn usage_of_steered_streams_is_reported() {
    last_events_are_told::<LlmdRouter>(SteeringMode::Auto).await;
    last_events_are_told::<Gie>(SteeringMode::Ingress).await;
}

/// E7: the same for a relayed stream.
#[tokio::test]
async fn usage_of_relayed_streams_is_reported() {
    last_events_are_told::<LlmdRouter>(SteeringMode::Off).await;
}

/// The kernel disarms such a stream repeatedly, so its end is assembled from steered and relayed bytes.
#[tokio::test]
async fn usage_of_streams_to_slow_clients_is_reported() {
    let stage = stage(LlmdRouter::new, ResponseToPicker::Usage, SteeringMode::Ingress).await;
    for (number, pace) in [1, 3, 7].into_iter().enumerate() {
        let mut client = Client::connect_with(stage.agent.addr, Some(4 << 10)).await.unwrap();
        client.send(&completion(20_000, 1)).await.unwrap();
        client.head().await.unwrap();
        let mut body = Vec::new();
        let pace = Pace::Slow { bytes: 40_000, tick: std::time::Duration::from_millis(pace) };
        let read = client.read_body(pace, |bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        });
        assert_eq!(read.await.unwrap().end, BodyEnd::Complete);
        let told = ended(&stage, number + 1).await[number].response_body();
        assert_eq!(String::from_utf8_lossy(&told.0), String::from_utf8_lossy(&first_and_last_events(&body)));
        assert_eq!(told.1, 1);
    }
    assert!(steered(&stage) > 0);
    assert!(stage.agent.count("penstock_steer_stops_total", &[]) > 0);
    assert_eq!(tokens(&stage, "output"), 60_000);
}

/// Many streams at once, each several times longer than what the kernel keeps, with events of all lengths.
#[tokio::test]
async fn ends_of_many_streams_are_told_exactly() {
    for mode in [SteeringMode::Local, SteeringMode::Ingress] {
        let stage = stage(LlmdRouter::new, ResponseToPicker::Usage, mode).await;
        let framings = [Framing::Chunked, Framing::ContentLength, Framing::UntilClose];
        let streams = (0..60_u64).map(|id| {
            let mut random = Random::new(id);
            let mut event = |n| {
                format!(
                    "event: e\ndata: {{\"stream\":{id},\"event\":{n},\"text\":\"{}\"}}\n\n",
                    "x".repeat(random.below(600) as usize)
                )
            };
            let says: String = (0..150).map(&mut event).collect();
            let plan = Plan {
                framing: framings[id as usize % framings.len()],
                says: true,
                headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
                chunks: Lengths::Random { seed: id, max: 900 },
                writes: Lengths::Random { seed: id, max: 1000 },
                pauses: Some(Pauses { seed: id, every: 2, up_to_us: 1500 }),
                ..Plan::default()
            };
            let body = serde_json::json!({"model": "m", "stream": true, "x-test-says": says}).to_string();
            let request = Request::post("/v1/completions", body).header("content-type", "application/json");
            let (request, address) = (request.header("x-test-plan", plan.header()), stage.agent.addr);
            async move {
                let mut client = Client::connect(address).await.unwrap();
                let response = client.request(&request).await.unwrap();
                assert_eq!((response.text(), response.read.end), (says, BodyEnd::Complete));
            }
        });
        futures_util::future::join_all(streams).await;
        for stream in ended(&stage, 60).await {
            let request: serde_json::Value = serde_json::from_slice(&stream.request_body().0).unwrap();
            let says = request["x-test-says"].as_str().unwrap();
            let told = stream.response_body();
            assert_eq!(String::from_utf8_lossy(&told.0), first_and_last(says), "{mode:?}");
            assert_eq!(told.1, 1);
        }
        let path = if mode == SteeringMode::Local { "path=\"local\"" } else { "path=\"ingress\"" };
        assert!(stage.agent.count("penstock_body_bytes_total", &[path]) > 500_000, "{mode:?}");
    }
}

/// Chunk sizes, extensions and trailers are not part of what is reported.
#[tokio::test]
async fn usage_with_any_framing_is_reported() {
    let says: String = (0..200).map(|n| format!("data: {n}\n\n")).collect();
    let body = serde_json::json!({"model": "m", "x-test-says": says}).to_string();
    for mode in [SteeringMode::Ingress, SteeringMode::Off] {
        let stage = stage(LlmdRouter::new, ResponseToPicker::Usage, mode).await;
        let framings = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];
        for (number, framing) in framings.into_iter().enumerate() {
            let chunked = framing == Framing::Chunked;
            let plan = Plan {
                framing,
                says: true,
                headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
                chunks: Lengths::Random { seed: 2, max: 300 },
                chunk_extension: chunked.then(|| "name=\"a value\"".to_owned()),
                trailers: if chunked { vec![("x-sum".to_owned(), "1".to_owned())] } else { Vec::new() },
                writes: Lengths::Random { seed: 3, max: 200 },
                pauses: Some(Pauses { seed: 4, every: 1, up_to_us: 3000 }),
                ..Plan::default()
            };
            let mut client = Client::connect(stage.agent.addr).await.unwrap();
            let request = Request::post("/v1/completions", body.clone()).header("content-type", "application/json");
            let response = client.request(&request.header("x-test-plan", plan.header())).await.unwrap();
            assert_eq!((response.text(), response.read.end), (says.clone(), BodyEnd::Complete));
            assert_eq!(ended(&stage, number + 1).await[number].response_body(), (response.body, 1), "{framing:?}");
            assert_eq!(steered(&stage) > 0, mode != SteeringMode::Off);
        }
    }
}

/// An HTTP/1.0 client gets the decoded body, and the picker the same bytes.
#[tokio::test]
async fn http10_clients_and_picker_get_same_decoded_bytes() {
    for told in [ResponseToPicker::Usage, ResponseToPicker::Body] {
        let stage = stage(LlmdRouter::new, told, SteeringMode::Auto).await;
        let wire = String::from_utf8(completion(5, 100).wire("agent")).unwrap().replacen("HTTP/1.1", "HTTP/1.0", 1);
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        client.send_raw(wire.as_bytes()).await.unwrap();
        let response = client.response().await.unwrap();
        assert_eq!((response.header("transfer-encoding"), response.events().len()), (None, 8));
        assert!(ended(&stage, 1).await[0].response_body() == (response.body, 1), "{told:?}");
        assert_eq!(tokens(&stage, "output"), 5);
    }
}

/// E7: a JSON document can only be parsed whole, so it is reported whole, up to a limit.
#[tokio::test]
async fn usage_of_json_documents_is_reported() {
    let mut stage = stage(LlmdRouter::new, ResponseToPicker::Usage, SteeringMode::Ingress).await;
    let body = r#"{"model":"m","max_tokens":20000,"prompt":"five words of a prompt"}"#;
    let request = Request::post("/v1/completions", body).header("content-type", "application/json");
    let response = stage.request(&request).await;
    assert_eq!(ended(&stage, 1).await[0].response_body(), (response.body, 1));
    assert_eq!((tokens(&stage, "input"), tokens(&stage, "output")), (5, 20_000));
    assert_eq!((relayed_and_told(&stage), steered(&stage)), (1, 0));

    // Above the limit nothing is reported; if the length says so, the response is steered.
    let large = Plan {
        size: 300_000,
        headers: vec![("content-type".to_owned(), "application/json".to_owned())],
        ..Plan::default()
    };
    for (number, framing) in [Framing::ContentLength, Framing::Chunked].into_iter().enumerate() {
        let plan = Plan { framing, ..large.clone() };
        let response = stage.request(&plan.request()).await;
        plan.checker().feed(&response.body).unwrap();
        assert_eq!(ended(&stage, number + 2).await[number + 1].response_body(), (Vec::new(), 1), "{framing:?}");
    }
    assert_eq!(relayed_and_told(&stage), 2);
}

/// Other content types are not inspected and are carried as usual.
#[tokio::test]
async fn other_content_types_are_not_reported() {
    let mut stage = stage(LlmdRouter::new, ResponseToPicker::Usage, SteeringMode::Ingress).await;
    let plan = Plan { size: 300_000, ..Plan::default() };
    let response = stage.request(&plan.request()).await;
    plan.checker().feed(&response.body).unwrap();
    assert_eq!(ended(&stage, 1).await[0].response_body(), (Vec::new(), 1));
    assert_eq!(relayed_for_the_picker(&stage), 0);
}

fn whole(plan: &Plan, response: &Response) {
    assert_eq!(response.read.end, BodyEnd::Complete);
    let mut checker = plan.checker();
    checker.feed(&response.body).unwrap();
    assert_eq!(checker.offset(), plan.size);
}

async fn every_byte_is_told<P: Personality>() {
    let mut stage = stage(|all| P::over(Endpoints::new(all)), ResponseToPicker::Body, SteeringMode::Ingress).await;
    let framings = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];
    for (number, framing) in framings.into_iter().enumerate() {
        let chunks = Lengths::Random { seed: 5, max: 100_000 };
        let plan = Plan { framing, chunks, size: 900_000, stream_id: 3, ..Plan::default() };
        let mut client = Client::connect(stage.agent.addr).await.unwrap();
        let response = client.request(&plan.request()).await.unwrap();
        whole(&plan, &response);
        let stream = &ended(&stage, number + 1).await[number];
        assert_eq!(stream.served(), Some(response.header("x-served-by").unwrap().to_owned()));
        assert!(stream.response_body() == (response.body, 1), "{framing:?}");
        for message in &stream.messages {
            if let Some(Told::ResponseBody(piece)) = &message.request {
                assert!(piece.body.len() <= 62_000, "{}", piece.body.len());
            }
        }
    }
    let response = stage.request(&completion(50, 100)).await;
    assert!(ended(&stage, 4).await[3].response_body() == (response.body, 1));
    assert_eq!((tokens(&stage, "output"), steered(&stage)), (50, 0));
    assert_eq!(returned_by_picker(&stage), 4);
    assert_eq!(stage.agent.count("penstock_epp_bodies_unanswered_total", &[]), 0);
}

/// E7: with `body`, every byte is reported in order, in pieces, with one end.
#[tokio::test]
async fn body_mode_reports_every_byte() {
    every_byte_is_told::<LlmdRouter>().await;
    every_byte_is_told::<penstock_tests::scripted_epp::Lwepp>().await;
}

/// E6: a picker that reads the body may evict the request in the middle of it. A body with a length is held until then.
#[tokio::test]
async fn eviction_during_body_breaks_off_response() {
    for framing in [Framing::Chunked, Framing::ContentLength] {
        let fault = Fault::At(Moment::ResponseBody, Harm::Immediate(429));
        let mut stage =
            stage(|all| Faulty::new(LlmdRouter::new(all), fault), ResponseToPicker::Body, SteeringMode::Off).await;
        let stall = ServerFault { after: 50_000, kind: FaultKind::Stall };
        let plan = Plan { size: 100_000, framing, fault: Some(stall), ..Plan::default() };
        stage.client.send(&plan.request()).await.unwrap();
        let head = stage.client.head().await.unwrap();
        let mut checker = plan.checker();
        if framing == Framing::Chunked {
            assert_eq!(head.status, 200);
            let read = stage.client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
            assert_ne!(read.end, BodyEnd::Complete);
        } else {
            assert_eq!(head.status, 429);
            assert_eq!(stage.client.read_body(Pace::Fast, |_| Ok(())).await.unwrap().end, BodyEnd::Complete);
        }
        eventually(SOON, || (stage.one.aborted(), stage.one.connections_open()) == (1, 0)).await;
        assert_eq!(stage.agent.count("penstock_evictions_total", &[]), 1);
    }
}
