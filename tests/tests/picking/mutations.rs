//! What pickers change of requests and responses, as the endpoint and the client see it.

use bytes::Bytes;
use penstock_proto::core::{HeaderValue, HeaderValueOption};
use penstock_tests::{
    Plan, Stage,
    content::Fnv,
    model_server::Echo,
    scripted_epp::{Answering, Dynamo, Lwepp, Production, reply},
    stage::{echo, json},
};

fn append(name: &str, value: &str) -> HeaderValueOption {
    let header = HeaderValue { key: name.to_owned(), value: value.to_owned(), ..HeaderValue::default() };
    HeaderValueOption { header: Some(header), append: Some(true), ..HeaderValueOption::default() }
}

fn all<'a>(seen: &'a Echo, name: &str) -> Vec<&'a str> {
    seen.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
}

#[tokio::test]
async fn fields_of_a_request_are_set_appended_and_removed() {
    let mut stage = Stage::new(|all| {
        let picked = all[0].to_string();
        Answering::new(move |_| {
            let mut mutation = reply::mutation(&[(reply::DESTINATION, &picked), ("x-set", "new"), ("x-fresh", "1")]);
            mutation.set_headers.push(append("x-append", "second"));
            mutation.remove_headers = vec!["x-remove".to_owned(), "X-Remove-Too".to_owned()];
            vec![reply::request_headers(mutation)]
        })
    })
    .await;
    let request = ["x-set", "x-append", "x-remove", "x-remove-too", "x-keep"]
        .iter()
        .fold(echo("{}"), |request, name| request.header(name, "first"));
    let seen = stage.request(&request).await.echoed();
    assert_eq!(all(&seen, "x-set"), ["new"]);
    assert_eq!(all(&seen, "x-fresh"), ["1"]);
    assert_eq!(all(&seen, "x-append").join(", "), "first, second");
    assert_eq!((all(&seen, "x-remove").len(), all(&seen, "x-remove-too").len()), (0, 0));
    assert_eq!(all(&seen, "x-keep"), ["first"]);
    assert!(all(&seen, reply::DESTINATION).is_empty());
}

#[tokio::test]
async fn framing_and_host_are_not_the_pickers_to_change() {
    let mut stage = Stage::new(|all| {
        let picked = all[0].to_string();
        let odd = [("content-length", "3"), ("transfer-encoding", "gzip"), ("host", "evil"), (":path", "/v1/evil")];
        Answering::new(move |_| vec![reply::pick(&picked, &odd)])
    })
    .await;
    let seen = stage.request(&echo(json("m", 100)).header("host", "models.example")).await.echoed();
    assert_eq!(all(&seen, "content-length"), [seen.body_length.to_string()]);
    assert_eq!((all(&seen, "host"), seen.target.as_str()), (vec!["models.example"], "/test/echo"));
    assert!(all(&seen, "transfer-encoding").is_empty());
}

#[tokio::test]
async fn a_replaced_body_comes_with_its_own_length() {
    let new = Bytes::from(json("other", 150_000));
    let mut stage = Stage::new(|all| {
        let (picked, new) = (all[0].to_string(), new.clone());
        Answering::new(move |_| [reply::pick(&picked, &[])].into_iter().chain(reply::request_body(&new)).collect())
    })
    .await;
    // One message of body, several, and none with a length.
    for request in [echo(json("m", 100)), echo(json("m", 200_000)), echo("").chunked(json("m", 1000), 100)] {
        let seen = stage.request(&request).await.echoed();
        assert_eq!(all(&seen, "content-length"), [new.len().to_string()]);
        assert_eq!(seen.body_hash, Fnv::of(&new).value());
    }
}

#[tokio::test]
async fn a_body_may_be_replaced_by_nothing() {
    let mut stage = Stage::new(|all| {
        let picked = all[0].to_string();
        Answering::new(move |_| {
            [reply::pick(&picked, &[])].into_iter().chain(reply::request_body(&Bytes::new())).collect()
        })
    })
    .await;
    let seen = stage.request(&echo(json("m", 1000))).await.echoed();
    assert_eq!((all(&seen, "content-length"), seen.body_length), (vec!["0"], 0));
}

#[tokio::test]
async fn production_rewrites_the_model_and_marks_the_response() {
    let mut stage = Stage::new(|all| Production::new(all).rewriting("adapter-7")).await;
    let response = stage.request(&echo(r#"{"model":"m"}"#)).await;
    let seen = response.echoed();
    assert_eq!(seen.body_hash, Fnv::of(br#"{"model":"adapter-7"}"#).value());
    assert_eq!(all(&seen, "content-length"), ["21"]);
    assert_eq!(response.header("x-went-into-resp-headers"), Some("true"));
}

#[tokio::test]
async fn lwepp_picks_what_the_request_says_and_names_who_served() {
    let mut stage = Stage::new(Lwepp::new).await;
    let told = stage.two.addr.to_string();
    let body = json("m", 200_000);
    for _ in 0..2 {
        let response = stage.request(&echo(body.clone()).header("test-epp-endpoint-selection", &told)).await;
        assert_eq!(response.header("x-conformance-test-served-endpoint"), Some(told.as_str()));
        let seen = response.echoed();
        assert_eq!(seen.header("x-echo-set-header"), Some("x-picked-by:lwepp"));
        assert_eq!(seen.body_hash, Fnv::of(&body).value());
    }
    assert_eq!(stage.requests(), (0, 2));
}

#[tokio::test]
async fn dynamo_removes_fields_and_adds_tokens() {
    let mut stage = Stage::new(Dynamo::new).await;
    let seen = stage.request(&echo(r#"{"model":"m"}"#).header("x-dynamo-request-control", "1")).await.echoed();
    assert_eq!(seen.header("x-worker-instance-id"), Some("1"));
    assert_eq!(seen.header("x-dynamo-request-control"), None);
    assert_eq!(seen.body_hash, Fnv::of(br#"{"model":"m","nvext":{"token_data":[1,2,3]}}"#).value());
    assert_eq!(all(&seen, "content-length"), [seen.body_length.to_string()]);
}

#[tokio::test]
async fn a_changed_response_keeps_its_body_and_its_length() {
    let mut stage = Stage::new(Production::new).await;
    let plan = Plan { size: 50_000, stream_id: 9, ..Plan::default() };
    let response = stage.request(&plan.request()).await;
    plan.checker().feed(&response.body).unwrap();
    assert_eq!((response.header("content-length"), response.body.len()), (Some("50000"), 50_000));
    assert_eq!(response.header("x-went-into-resp-headers"), Some("true"));
}
