//! The model named in a request's body becomes a header.

use penstock_tests::{
    Alphabet, Request, Stage,
    content::Fnv,
    scripted_epp::{Answering, Script, header, reply},
    stage::{echo, json},
};

const MODEL: &str = "x-gateway-model-name";

/// Takes any body, JSON or not.
fn first(all: &[std::net::SocketAddr]) -> impl Script + use<> {
    let picked = all[0].to_string();
    Answering::new(move |_| vec![reply::pick(&picked, &[])])
}

#[tokio::test]
async fn picker_and_endpoint_are_told_the_model() {
    let mut stage = Stage::new(first).await;
    let seen = stage.request(&echo(json("llama", 1000))).await.echoed();
    assert_eq!(seen.header(MODEL), Some("llama"));
    assert_eq!(header(&stage.epp.streams()[0].request_headers(), MODEL), Some("llama"));
}

#[tokio::test]
async fn a_model_at_the_end_of_a_large_body_still_reaches_the_endpoint() {
    let mut stage = Stage::new(first).await;
    let prompt = String::from_utf8(Alphabet::Text.bytes(2, 0, 300_000)).unwrap();
    let seen = stage.request(&echo(format!(r#"{{"prompt":"{prompt}","model":"late"}}"#))).await.echoed();
    assert_eq!(seen.header(MODEL), Some("late"));
}

#[tokio::test]
async fn the_model_that_a_client_claims_is_replaced() {
    let mut stage = Stage::new(first).await;
    let claim = echo(json("llama", 10)).header("X-Gateway-Model-Name", "gpt").header("x_gateway_model_name", "gpt");
    let seen = stage.request(&claim).await.echoed();
    let names: Vec<_> =
        seen.headers.iter().filter(|(name, _)| name.replace('_', "-").eq_ignore_ascii_case(MODEL)).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(seen.header(MODEL), Some("llama"));
}

#[tokio::test]
async fn without_a_model_the_default_is_told() {
    let mut stage = Stage::with(first, |config| config.bbr.default_model = Some("base".to_owned())).await;
    let seen = stage.request(&echo(r#"{"prompt":"p"}"#)).await.echoed();
    assert_eq!(seen.header(MODEL), Some("base"));
    assert_eq!(header(&stage.epp.streams()[0].request_headers(), MODEL), Some("base"));
    assert_eq!(stage.request(&echo(json("llama", 10))).await.echoed().header(MODEL), Some("llama"));
}

#[tokio::test]
async fn a_body_that_is_not_json_goes_untouched() {
    let mut stage = Stage::new(first).await;
    let body = Alphabet::Binary.bytes(3, 0, 200_000);
    let hash = Fnv::of(&body).value();
    let request = Request::post("/test/echo", body.clone()).header("content-type", "application/octet-stream");
    let seen = stage.request(&request).await.echoed();
    assert_eq!((seen.body_length, seen.body_hash), (200_000, hash));
    assert_eq!(seen.header(MODEL), None);
    assert!(stage.epp.streams()[0].request_body() == (body, 1), "the picker is told the body and one end");
}

#[tokio::test]
async fn chunks_arrive_as_the_same_body() {
    let mut stage = Stage::new(first).await;
    let body = json("llama", 100_000);
    let hash = Fnv::of(&body).value();
    let request = Request::new("POST", "/test/echo").header("content-type", "application/json").chunked(body, 7000);
    let seen = stage.request(&request).await.echoed();
    assert_eq!((seen.body_hash, seen.header(MODEL)), (hash, Some("llama")));
}
