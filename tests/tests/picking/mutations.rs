//! The picker's changes to requests and responses, as seen by endpoint and client.

use bytes::Bytes;
use penstock_proto::{
    core::{HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction},
    ext_proc::{
        BodyResponse, CommonResponse, HeaderMutation, HttpHeaders, ProcessingResponse, processing_response::Response,
    },
};
use penstock_tests::{
    Plan, Request, Stage,
    client::Head,
    content::Fnv,
    model_server::{Echo, Framing},
    scripted_epp::{Answer, Answering, Dynamo, Exchange, Lwepp, Production, Script, reply},
    stage::{echo, json},
};

fn set(name: &str, value: &str, append: Option<bool>, action: HeaderAppendAction) -> HeaderValueOption {
    let header = HeaderValue { key: name.to_owned(), value: value.to_owned(), ..HeaderValue::default() };
    HeaderValueOption { header: Some(header), append, append_action: action.into() }
}

fn append(name: &str, value: &str) -> HeaderValueOption {
    set(name, value, Some(true), HeaderAppendAction::AppendIfExistsOrAdd)
}

fn all<'a>(seen: &'a Echo, name: &str) -> Vec<&'a str> {
    seen.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
}

/// E4.
#[tokio::test]
async fn request_fields_are_set_appended_and_removed() {
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
async fn picker_changes_to_framing_and_host_are_ignored() {
    let mut stage = Stage::new(|all| {
        let picked = all[0].to_string();
        let odd = [("content-length", "3"), ("transfer-encoding", "gzip"), ("host", "evil"), (":authority", "evil")];
        Answering::new(move |_| vec![reply::pick(&picked, &odd)])
    })
    .await;
    let seen = stage.request(&echo(json("m", 100)).header("host", "models.example")).await.echoed();
    assert_eq!(all(&seen, "content-length"), [seen.body_length.to_string()]);
    assert_eq!((all(&seen, "host"), seen.target.as_str()), (vec!["models.example"], "/test/echo"));
    assert!(all(&seen, "transfer-encoding").is_empty());
}

/// E3.
#[tokio::test]
async fn replaced_body_has_its_own_length() {
    let new = Bytes::from(json("other", 150_000));
    let mut stage = Stage::new(|all| {
        let (picked, new) = (all[0].to_string(), new.clone());
        Answering::new(move |_| [reply::pick(&picked, &[])].into_iter().chain(reply::request_body(&new)).collect())
    })
    .await;
    // A body of one message, of several, and without a length.
    for request in [echo(json("m", 100)), echo(json("m", 200_000)), echo("").chunked(json("m", 1000), 100)] {
        let seen = stage.request(&request).await.echoed();
        assert_eq!(all(&seen, "content-length"), [new.len().to_string()]);
        assert_eq!(seen.body_hash, Fnv::of(&new).value());
    }
}

/// E3.
#[tokio::test]
async fn body_replaced_by_empty_body_is_sent() {
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

/// E3, E4.
#[tokio::test]
async fn gie_rewrites_model_and_marks_response() {
    let mut stage = Stage::new(|all| Production::new(all).rewriting("adapter-7")).await;
    let response = stage.request(&echo(r#"{"model":"m"}"#)).await;
    let seen = response.echoed();
    assert_eq!(seen.body_hash, Fnv::of(br#"{"model":"adapter-7"}"#).value());
    assert_eq!(all(&seen, "content-length"), ["21"]);
    assert_eq!(response.header("x-went-into-resp-headers"), Some("true"));
}

/// E4, E8.
#[tokio::test]
async fn lwepp_follows_selection_and_names_served_endpoint() {
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

/// E3, E4.
#[tokio::test]
async fn dynamo_removes_fields_and_adds_tokens() {
    let mut stage = Stage::new(Dynamo::new).await;
    let seen = stage.request(&echo(r#"{"model":"m"}"#).header("x-dynamo-request-control", "1")).await.echoed();
    assert_eq!(seen.header("x-worker-instance-id"), Some("1"));
    assert_eq!(seen.header("x-dynamo-request-control"), None);
    assert_eq!(seen.body_hash, Fnv::of(br#"{"model":"m","nvext":{"token_data":[1,2,3]}}"#).value());
    assert_eq!(all(&seen, "content-length"), [seen.body_length.to_string()]);
}

/// E4.
#[tokio::test]
async fn mutated_response_keeps_body_and_length() {
    let mut stage = Stage::new(Production::new).await;
    let plan = Plan { size: 50_000, stream_id: 9, ..Plan::default() };
    let response = stage.request(&plan.request()).await;
    plan.checker().feed(&response.body).unwrap();
    assert_eq!((response.header("content-length"), response.body.len()), (Some("50000"), 50_000));
    assert_eq!(response.header("x-went-into-resp-headers"), Some("true"));
}

/// Picks the first endpoint for requests without a body, with this mutation of request and response.
struct Mutating {
    picked: String,
    mutation: HeaderMutation,
}

#[tonic::async_trait]
impl Script for Mutating {
    async fn request_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let mut message = reply::request_headers(self.mutation.clone());
        message.dynamic_metadata = Some(reply::destination(&self.picked));
        exchange.send(message).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        exchange.send(reply::response_mutation(self.mutation.clone())).await
    }
}

fn mutation(set_headers: Vec<HeaderValueOption>, remove: &[&str]) -> HeaderMutation {
    HeaderMutation { set_headers, remove_headers: remove.iter().map(|name| (*name).to_owned()).collect() }
}

fn values(head: &Head, name: &str) -> Vec<String> {
    let named = head.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
    named.map(|(_, value)| value.clone()).collect()
}

/// E4: each append action, on an existing and a missing field, in both directions.
#[tokio::test]
async fn every_append_action_applies_both_ways() {
    use HeaderAppendAction::{AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd};
    // Append action, then the results for a field with the value "old" and for a missing one.
    let rows: [(_, _, &[&str], &[&str]); 8] = [
        (None, AppendIfExistsOrAdd, &["new"], &["new"]),
        (Some(false), AppendIfExistsOrAdd, &["new"], &["new"]),
        (Some(true), AppendIfExistsOrAdd, &["old", "new"], &["new"]),
        (Some(true), OverwriteIfExistsOrAdd, &["old", "new"], &["new"]),
        (None, AddIfAbsent, &["old"], &["new"]),
        (None, OverwriteIfExistsOrAdd, &["new"], &["new"]),
        (Some(false), OverwriteIfExistsOrAdd, &["new"], &["new"]),
        (None, OverwriteIfExists, &["new"], &[]),
    ];
    for (append, action, there, missing) in rows {
        let options = ["x-there", "x-missing"].map(|name| set(name, "new", append, action)).to_vec();
        let mutation = mutation(options, &["x-removed", "X-Removed-Too"]);
        let mut stage = Stage::new(|all| Mutating { picked: all[0].to_string(), mutation }).await;
        let fields = ["x-there", "x-removed", "x-removed-too"];
        let plan = Plan {
            size: 10,
            headers: fields.map(|name| (name.to_owned(), "old".to_owned())).to_vec(),
            ..Plan::default()
        };
        let request = fields.iter().fold(plan.request(), |request, name| request.header(name, "old"));
        let response = stage.request(&request).await;
        let seen = &stage.one.seen()[0];
        let case = format!("{append:?} {action:?}");
        assert_eq!((all(seen, "x-there"), all(seen, "x-missing")), (there.to_vec(), missing.to_vec()), "{case}");
        let (head_there, head_missing) = (values(&response.head, "x-there"), values(&response.head, "x-missing"));
        assert_eq!((head_there, head_missing), (own(there), own(missing)), "{case}");
        for removed in ["x-removed", "x-removed-too"] {
            assert!(all(seen, removed).is_empty() && values(&response.head, removed).is_empty(), "{case}");
        }
    }
}

fn own(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// E4: the picker cannot change framing and connection fields of a response, in any way it tries.
#[tokio::test]
async fn picker_changes_to_response_framing_are_ignored() {
    let fields = [
        ("content-length", "3"),
        ("transfer-encoding", "gzip, chunked"),
        ("connection", "close"),
        ("keep-alive", "timeout=1"),
        ("trailer", "x-sum"),
        ("upgrade", "websocket"),
        (":status", "204"),
    ];
    let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
    let each = |append, action| fields.iter().map(|(name, value)| set(name, value, append, action)).collect();
    let mutations = [
        mutation(each(None, HeaderAppendAction::OverwriteIfExistsOrAdd), &[]),
        mutation(each(Some(true), HeaderAppendAction::AppendIfExistsOrAdd), &[]),
        mutation(Vec::new(), &names),
    ];
    for mutation in mutations {
        let mut stage = Stage::new(|all| Mutating { picked: all[0].to_string(), mutation }).await;
        for (framing, declared) in [(Framing::ContentLength, "content-length"), (Framing::Chunked, "transfer-encoding")]
        {
            let plan = Plan { size: 50_000, framing, ..Plan::default() };
            let response = stage.request(&plan.request()).await;
            plan.checker().feed(&response.body).unwrap();
            assert_eq!((response.status(), response.body.len()), (200, 50_000));
            let expected = if framing == Framing::Chunked { "chunked" } else { "50000" };
            assert_eq!(values(&response.head, declared), [expected]);
            for (name, _) in fields {
                assert!(name == declared || values(&response.head, name).is_empty(), "{framing:?} {name}");
            }
        }
        assert_eq!(stage.agent.count("penstock_endpoint_connections_total", &[r#"result="new""#]), 1);
    }
}

/// E4: replies are applied one after the other; within one, removals come first.
#[tokio::test]
async fn field_that_a_later_reply_removes_is_not_sent() {
    let mut stage = Stage::new(|all| {
        let picked = all[0].to_string();
        Answering::new(move |_| {
            let common = CommonResponse {
                header_mutation: Some(HeaderMutation {
                    remove_headers: vec!["x-tmp".to_owned(), "x-late".to_owned()],
                    ..reply::mutation(&[("x-late", "2")])
                }),
                ..CommonResponse::default()
            };
            let removal = Response::RequestBody(BodyResponse { response: Some(common) });
            let removal = ProcessingResponse { response: Some(removal), ..ProcessingResponse::default() };
            vec![reply::pick(&picked, &[("x-tmp", "1"), ("x-late", "1"), ("x-kept", "1")]), removal]
        })
    })
    .await;
    let seen = stage.request(&echo(json("m", 100)).header("x-tmp", "client")).await.echoed();
    assert_eq!((seen.header("x-tmp"), seen.header("x-late"), seen.header("x-kept")), (None, Some("2"), Some("1")));
}

/// E4: as with Envoy's default rules for mutations. The client's target stays in the log.
#[tokio::test]
async fn path_and_status_are_changed() {
    let with = |set_headers: &[(&str, &str)], remove: &[&str]| HeaderMutation {
        remove_headers: remove.iter().map(|name| (*name).to_owned()).collect(),
        ..reply::mutation(set_headers)
    };
    for (path, target) in
        [("/test/echo?by=epp", "/test/echo?by=epp"), ("no path", "/test/echo"), ("/a#b", "/test/echo")]
    {
        let mutation = with(&[(":path", path)], &[":path", ":method"]);
        let mut stage = Stage::new(|all| Mutating { picked: all[0].to_string(), mutation }).await;
        let response = stage.request(&Request::get("/test/echo")).await;
        assert_eq!((response.status(), response.echoed().target.as_str()), (200, target));
    }
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let mutation = with(&[(":status", "503")], &[":status"]);
        let mut stage = Stage::new(|all| Mutating { picked: all[0].to_string(), mutation }).await;
        let plan = Plan { size: 50_000, framing, ..Plan::default() };
        for _ in 0..2 {
            let response = stage.request(&plan.request()).await;
            plan.checker().feed(&response.body).unwrap();
            assert_eq!((response.status(), response.body.len()), (503, 50_000));
        }
    }
}
