//! The model in a request body becomes a header; bodies without a model.

use penstock_agent::config::{Config, MissingModel};
use penstock_tests::{
    Alphabet, Client, Request, Stage,
    content::Fnv,
    eventually,
    scripted_epp::{Answering, Script, StreamEnd, header, reply},
    stage::{echo, json},
};

use crate::SOON;

const JSON: &str = "application/json";
const MODEL: &str = "x-gateway-model-name";

/// Accepts any body, JSON or not.
fn first(all: &[std::net::SocketAddr]) -> impl Script + use<> {
    let picked = all[0].to_string();
    Answering::new(move |_| vec![reply::pick(&picked, &[])])
}

#[tokio::test]
async fn model_header_reaches_picker_and_endpoint() {
    let mut stage = Stage::new(first).await;
    let seen = stage.request(&echo(json("llama", 1000))).await.echoed();
    assert_eq!(seen.header(MODEL), Some("llama"));
    assert_eq!(header(&stage.epp.streams()[0].request_headers(), MODEL), Some("llama"));
}

#[tokio::test]
async fn model_at_end_of_large_body_reaches_endpoint() {
    let mut stage = Stage::new(first).await;
    let prompt = String::from_utf8(Alphabet::Text.bytes(2, 0, 300_000)).unwrap();
    let seen = stage.request(&echo(format!(r#"{{"prompt":"{prompt}","model":"late"}}"#))).await.echoed();
    assert_eq!(seen.header(MODEL), Some("late"));
}

#[tokio::test]
async fn model_header_from_client_is_replaced() {
    let mut stage = Stage::new(first).await;
    let claim = echo(json("llama", 10)).header("X-Gateway-Model-Name", "gpt").header("x_gateway_model_name", "gpt");
    let seen = stage.request(&claim).await.echoed();
    let names: Vec<_> =
        seen.headers.iter().filter(|(name, _)| name.replace('_', "-").eq_ignore_ascii_case(MODEL)).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(seen.header(MODEL), Some("llama"));
}

/// Bodies with a length before each message, or with several documents.
#[tokio::test]
async fn json_in_frames_is_no_document() {
    let mut stage = Stage::new(first).await;
    for kind in
        ["application/grpc+json", "application/grpc-web+json", "application/connect+json", "application/stream+json"]
    {
        let request = Request::post("/test/echo", &b"\0\0\0\0\x0d{\"model\":\"m\"}"[..]).header("content-type", kind);
        let seen = stage.request(&request).await.echoed();
        assert_eq!((seen.header(MODEL), seen.body_length), (None, 18), "{kind}");
    }
    let seen = stage
        .request(&Request::post("/test/echo", r#"{"model":"m"}"#).header("content-type", "application/ld+json"))
        .await;
    assert_eq!(seen.echoed().header(MODEL), Some("m"));
}

/// Transcriptions are forms whose file may come before the model's name.
#[tokio::test]
async fn model_of_a_form_and_of_a_query_reaches_picker_and_endpoint() {
    let mut stage = Stage::new(first).await;
    let audio = String::from_utf8(Alphabet::Text.bytes(3, 0, 200_000)).unwrap();
    let form = format!(
        "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n{audio}\r\n\
         --b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--b--\r\n"
    );
    let request = Request::post("/test/echo", form.clone()).header("content-type", "multipart/form-data; boundary=b");
    let seen = stage.request(&request).await.echoed();
    assert_eq!((seen.header(MODEL), seen.body_length), (Some("whisper-1"), form.len() as u64));

    let seen = stage.request(&Request::get("/test/echo?model=gpt%2Drealtime")).await.echoed();
    assert_eq!(seen.header(MODEL), Some("gpt-realtime"));
    let streams = stage.epp.streams();
    assert_eq!(header(&streams.last().unwrap().request_headers(), MODEL), Some("gpt-realtime"));
}

/// A header would name another model: white space around a value is not part of it.
/// Whatever bytes the parameters of the type have.
#[tokio::test]
async fn parameters_of_the_type_do_not_hide_the_model() {
    let mut stage = Stage::new(first).await;
    let form = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b--\r\n";
    for (kind, body) in [
        ("application/json; x=\u{e9}", r#"{"model":"m"}"#),
        ("multipart/form-data; boundary=b; x=\u{e9}", form),
        ("multipart/form-data; x=\"\u{e9}\"; boundary=b", form),
    ] {
        let seen = stage.request(&Request::post("/test/echo", body).header("content-type", kind)).await.echoed();
        assert_eq!(seen.header(MODEL), Some("m"), "{kind}");
    }
}

#[tokio::test]
async fn model_with_white_space_around_it_has_no_header() {
    let mut stage = Stage::new(first).await;
    for body in [r#"{"model":" m"}"#, r#"{"model":"m "}"#, r#"{"model":"\tm"}"#, r#"{"model":" "}"#] {
        let request = Request::post("/test/echo", body).header("content-type", JSON);
        assert_eq!(stage.request(&request).await.echoed().header(MODEL), None, "{body}");
    }
    let request = Request::post("/test/echo", r#"{"model":"a m"}"#).header("content-type", JSON);
    assert_eq!(stage.request(&request).await.echoed().header(MODEL), Some("a m"));
}

/// It has the same meaning whether its length is announced or not.
#[tokio::test]
async fn empty_json_body_is_none() {
    for rule in [MissingModel::Pass, MissingModel::Reject] {
        let mut stage = Stage::with(first, missing(rule)).await;
        for method in ["POST", "GET", "DELETE"] {
            for request in
                [Request::new(method, "/test/echo").body(""), Request::new(method, "/test/echo").chunked("", 1)]
            {
                let response = stage.request(&request.header("content-type", JSON)).await;
                assert_eq!((response.status(), response.echoed().body_length), (200, 0), "{method}");
            }
        }
        assert_eq!(counted(&stage), [0, 0, 0]);
    }
}

fn missing(rule: MissingModel) -> impl FnOnce(&mut Config) {
    |config| config.bbr.missing_model = rule
}

/// Counts of JSON bodies with a model, without one, and with an empty one.
fn counted(stage: &Stage) -> [u64; 3] {
    ["success", "body_field_not_found", "body_field_empty"]
        .map(|name| stage.agent.count(&format!("penstock_bbr_{name}_total"), &[]))
}

/// JSON without a model, with an empty one, and with one that is not a name.
const NAMELESS: [&str; 4] = [r#"{"prompt":"p"}"#, r#"{"model":""}"#, r#"{"model":null}"#, r#"{"model":["m"]}"#];

/// D11.
#[tokio::test]
async fn missing_model_passes_without_header() {
    let mut stage = Stage::new(first).await;
    for (stream, body) in NAMELESS.into_iter().enumerate() {
        let seen = stage.request(&echo(body)).await.echoed();
        assert_eq!((seen.body_hash, seen.header(MODEL)), (Fnv::of(body.as_bytes()).value(), None));
        assert_eq!(header(&stage.epp.streams()[stream].request_headers(), MODEL), None);
    }
    assert_eq!(counted(&stage), [0, 3, 1]);
}

/// D11.
#[tokio::test]
async fn missing_model_uses_default() {
    let mut stage = Stage::with(first, missing(MissingModel::Default("base".to_owned()))).await;
    for (stream, body) in NAMELESS.into_iter().enumerate() {
        let seen = stage.request(&echo(body)).await.echoed();
        assert_eq!(seen.header(MODEL), Some("base"));
        assert_eq!(header(&stage.epp.streams()[stream].request_headers(), MODEL), Some("base"));
    }
    assert_eq!(stage.request(&echo(json("llama", 10))).await.echoed().header(MODEL), Some("llama"));
    assert_eq!(stage.request(&Request::get("/test/echo")).await.echoed().header(MODEL), None);
    assert_eq!(counted(&stage), [1, 3, 1]);
}

/// D11: no picker is asked, and nothing is forwarded.
#[tokio::test]
async fn missing_model_is_rejected_if_configured() {
    let mut stage = Stage::with(first, missing(MissingModel::Reject)).await;
    for body in NAMELESS {
        let response = stage.request(&echo(body)).await;
        assert_eq!((response.status(), response.error_code().as_str()), (400, "model_missing"), "{body}");
        stage.client = Client::connect(stage.agent.addr).await.unwrap();
    }
    assert_eq!((stage.epp.streams_started(), stage.requests()), (0, (0, 0)));
    // Other bodies are unaffected.
    for request in [Request::get("/test/echo"), Request::post("/test/echo", "a=b"), echo(""), echo(json("llama", 10))] {
        assert_eq!(stage.request(&request).await.status(), 200);
    }
    assert_eq!(counted(&stage), [1, 3, 1]);
}

/// D11: even at the end of a long body that the picker has received by then.
#[tokio::test]
async fn long_body_without_model_is_rejected_at_its_end() {
    let mut stage = Stage::with(first, missing(MissingModel::Reject)).await;
    let prompt = String::from_utf8(Alphabet::Text.bytes(2, 0, 300_000)).unwrap();
    let wire = echo(format!(r#"{{"prompt":"{prompt}"}}"#)).wire("agent");
    let (first, last) = wire.split_at(wire.len() - 1);
    stage.client.send_raw(first).await.unwrap();
    eventually(SOON, || stage.epp.streams_started() == 1).await;
    stage.client.send_raw(last).await.unwrap();
    let response = stage.client.response().await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (400, "model_missing"));
    eventually(SOON, || stage.epp.streams_ended(StreamEnd::Cancelled) == 1).await;
    assert_eq!(stage.requests(), (0, 0));
}

/// D11: numbers and booleans become their text.
#[tokio::test]
async fn nonstring_model_becomes_its_text() {
    let mut stage = Stage::with(first, missing(MissingModel::Reject)).await;
    for (body, model) in [(r#"{"model":7}"#, "7"), (r#"{"model": 1.50 }"#, "1.50"), (r#"{"model":true}"#, "true")] {
        assert_eq!(stage.request(&echo(body)).await.echoed().header(MODEL), Some(model));
    }
}

/// D11: picker and endpoint get the adapter's name and its base model, never the client's value.
#[tokio::test]
async fn adapter_reports_its_base_model() {
    const BASE: &str = "x-gateway-base-model-name";
    let mut stage = Stage::with(first, |config| {
        config.bbr.base_models = [("sql-lora".to_owned(), "llama".to_owned())].into();
    })
    .await;
    let late = format!(r#"{{"prompt":"{}","model":"sql-lora"}}"#, "p".repeat(300_000));
    let rows = [
        (json("sql-lora", 10), Some("llama"), Some("llama")),
        (json("llama", 10), Some("llama"), Some("llama")),
        (json("other", 10), None, None),
        (r#"{"prompt":"p"}"#.into(), None, None),
        // The model is known only after the picker was asked.
        (late.into_bytes(), Some("llama"), None),
    ];
    for (stream, (body, to_endpoint, to_picker)) in rows.into_iter().enumerate() {
        let claims =
            echo(body).header("X-Gateway-Base-Model-Name", "claim").header("x_gateway_base_model_name", "claim");
        let seen = stage.request(&claims).await.echoed();
        assert_eq!(seen.header(BASE), to_endpoint, "{stream}");
        assert_eq!(header(&stage.epp.streams()[stream].request_headers(), BASE), to_picker, "{stream}");
        assert!(!seen.headers.iter().any(|(_, value)| value == "claim"), "{stream}");
    }
}

/// D11: byte for byte, whatever applies to JSON without a model.
#[tokio::test]
async fn body_without_json_passes_unchanged() {
    let mut stage = Stage::with(first, missing(MissingModel::Reject)).await;
    let form = [
        b"--x\r\ncontent-disposition: form-data; name=\"prompt\"\r\n\r\nwhisper\r\n--x\r\n\
          content-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n",
        Alphabet::Binary.bytes(3, 0, 200_000).as_slice(),
        b"\r\n--x--\r\n",
    ]
    .concat();
    let rows = [
        (Some("multipart/form-data; boundary=x"), form),
        (Some("application/octet-stream"), Alphabet::Binary.bytes(3, 0, 200_000)),
        (Some("application/x-www-form-urlencoded"), json("m", 100)),
        (Some("text/plain"), b"{".to_vec()),
        (None, json("m", 100)),
        (None, b"{not json".to_vec()),
    ];
    for (stream, (kind, body)) in rows.into_iter().enumerate() {
        for chunked in [false, true] {
            let request = Request::new("POST", "/test/echo");
            let request = kind.iter().fold(request, |request, kind| request.header("content-type", *kind));
            let request = if chunked { request.chunked(body.clone(), 7000) } else { request.body(body.clone()) };
            let seen = stage.request(&request).await.echoed();
            assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(&body).value()), "{kind:?}");
            assert_eq!((seen.header("content-type"), seen.header(MODEL)), (kind, None));
            let told = &stage.epp.streams()[2 * stream + usize::from(chunked)];
            assert!(told.request_body() == (body.clone(), 1), "expected the picker to get the body and one end");
        }
    }
    assert_eq!(counted(&stage), [0, 0, 0]);
}

#[tokio::test]
async fn chunked_body_arrives_unchanged() {
    let mut stage = Stage::new(first).await;
    let body = json("llama", 100_000);
    let hash = Fnv::of(&body).value();
    let request = Request::new("POST", "/test/echo").header("content-type", "application/json").chunked(body, 7000);
    let seen = stage.request(&request).await.echoed();
    assert_eq!((seen.body_hash, seen.header(MODEL)), (hash, Some("llama")));
}
