//! Bodies with a content coding, a byte order mark or an encoding other than UTF-8: the agent finds their model and forwards
//! them unchanged.

use std::io::Write as _;

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use penstock_agent::config::{Config, MissingModel, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Request, Response, Stage,
    agent::{TestAgent, builtin_pool},
    content::Fnv,
    scripted_epp::{Answering, Production, header, reply},
    stage::json,
};

const GZIP: &[u8] = include_bytes!("../../../agent/src/http/coding/testdata/body.gz");
const BROTLI: &[u8] = include_bytes!("../../../agent/src/http/coding/testdata/body.br");
const ZSTD: &[u8] = include_bytes!("../../../agent/src/http/coding/testdata/body.zst");
/// The model that the bodies name.
const MODEL: &str = "llama-3.1-8b";

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The content coding `deflate`.
fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Without the header of zlib, as some senders understand `deflate`.
fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn coded(coding: &str, body: impl Into<bytes::Bytes>) -> Request {
    let request = Request::post("/test/echo", body).header("content-type", "application/json");
    if coding.is_empty() { request } else { request.header("content-encoding", coding) }
}

/// An agent that routes [`MODEL`] to the first server and, with `other`, everything else to the second.
async fn routed(other: bool, adjust: impl FnOnce(&mut Config)) -> (TestAgent, [ModelServer; 2]) {
    let servers =
        [ModelServer::start(Default::default()).await.unwrap(), ModelServer::start(Default::default()).await.unwrap()];
    let rest = if other { "[[routes]]\npool = \"second\"" } else { "" };
    let text = format!(
        "[[pools]]\nname = \"first\"\nendpoints = [\"{}\"]\n[[pools]]\nname = \"second\"\nendpoints = [\"{}\"]\n\
         [[routes]]\nmodel = \"{MODEL}\"\npool = \"first\"\n{rest}\n",
        servers[0].addr, servers[1].addr
    );
    let Config { pools, routes, .. } = Config::parse(&text, "test.toml").unwrap();
    let agent = TestAgent::start(builtin_pool(&[]), SteeringMode::Off, |config| {
        (config.pools, config.routes) = (pools, routes);
        adjust(config);
    });
    (agent, servers)
}

async fn ask(agent: &TestAgent, request: &Request) -> Response {
    Client::connect(agent.addr).await.unwrap().request(request).await.unwrap()
}

/// Asserts that the endpoint got the sent fields and bytes.
fn unchanged(response: &Response, coding: &str, body: &[u8]) {
    let echo = response.echoed();
    assert_eq!((echo.body_length, echo.body_hash), (body.len() as u64, Fnv::of(body).value()));
    assert_eq!(echo.header("content-encoding").unwrap_or_default(), coding);
}

#[tokio::test]
async fn coded_body_is_routed_by_model_and_forwarded_unchanged() {
    let (agent, servers) = routed(true, |_| {}).await;
    let rows: [(&str, Vec<u8>, bool); 14] = [
        ("gzip", GZIP.to_vec(), true),
        ("x-gzip", GZIP.to_vec(), true),
        ("deflate", zlib(&json(MODEL, 100)), true),
        ("deflate", deflate(&json(MODEL, 100)), true),
        ("deflate", zlib(&json("another", 100)), false),
        ("deflate, gzip", gzip(&zlib(&json(MODEL, 100))), true),
        ("GZIP", GZIP.to_vec(), true),
        ("br", BROTLI.to_vec(), true),
        ("zstd", ZSTD.to_vec(), true),
        ("br, gzip", gzip(BROTLI), true),
        ("identity", json(MODEL, 100), true),
        ("gzip", gzip(&json("another", 10)), false),
        // Unreadable, and no route needs it.
        ("", json(MODEL, 100), true),
        ("gzip", gzip(br#"{"prompt":"without a model"}"#), false),
    ];
    for (coding, body, first) in rows {
        let response = ask(&agent, &coded(coding, body.clone())).await;
        let served = response.served_by();
        assert_eq!(served, Some(servers[usize::from(!first)].addr), "{coding}: {}", response.text());
        unchanged(&response, coding, &body);
        let model = response.echoed().header("x-gateway-model-name").map(str::to_owned);
        assert_eq!(model.as_deref() == Some(MODEL), first, "{coding}: {model:?}");
    }
    // A body whose type is not JSON is not inspected.
    let upload =
        Request::post("/test/echo", "x").header("content-type", "text/plain").header("content-encoding", "zip");
    assert_eq!(ask(&agent, &upload).await.served_by(), Some(servers[1].addr));
}

#[tokio::test]
async fn unreadable_coded_body_with_model_route_is_rejected() {
    let (agent, servers) = routed(true, |config| config.limits.decoded_body_bytes = 100_000).await;
    let bomb = gzip(&[&br#"{"model":"m","prompt":""#[..], &[b' '; 1 << 20], b"\"}"].concat());
    let rows: [(&str, Vec<u8>, u16, &str); 10] = [
        ("deflate", GZIP.to_vec(), 400, "coded_body"),
        ("compress", json(MODEL, 10), 415, "content_coding"),
        ("gzip, aes128gcm", GZIP.to_vec(), 415, "content_coding"),
        ("gzip, gzip, gzip, gzip", GZIP.to_vec(), 415, "content_coding"),
        ("gzip", GZIP[..GZIP.len() - 3].to_vec(), 400, "coded_body"),
        ("gzip", json(MODEL, 10), 400, "coded_body"),
        ("br", GZIP.to_vec(), 400, "coded_body"),
        ("zstd", ZSTD[..100].to_vec(), 400, "coded_body"),
        ("gzip", bomb, 413, "decoded_body_too_large"),
        ("gzip", gzip(br#"{"model":"m","model":"n"}"#), 400, "json"),
    ];
    for (coding, body, status, code) in rows {
        let response = ask(&agent, &coded(coding, body.clone())).await;
        assert_eq!((response.status(), response.error_code().as_str()), (status, code), "{coding}");
        let accepted = response.header("accept-encoding");
        assert_eq!(accepted, (status == 415).then_some("gzip, deflate, br, zstd"), "{coding}");
    }
    assert_eq!((servers[0].requests(), servers[1].requests()), (0, 0));
}

/// If no route needs the model, it becomes a header where it can be read, and the body passes in any case.
#[tokio::test]
async fn unreadable_coded_body_without_model_route_passes() {
    // An EPP that does not read the body.
    let echoes = |all: &[std::net::SocketAddr]| {
        let named = all[0].to_string();
        Answering::new(move |exchange| {
            let mut replies = vec![reply::pick(&named, &[])];
            replies.extend(reply::request_body(&exchange.request_body.clone().into()));
            replies
        })
    };
    let bomb = gzip(&[&br#"{"prompt":""#[..], &[b' '; 1 << 20], b"\",\"model\":\"m\"}"].concat());
    let rows: [(&str, Vec<u8>, Option<&str>); 8] = [
        ("gzip", GZIP.to_vec(), Some(MODEL)),
        ("br", BROTLI.to_vec(), Some(MODEL)),
        ("zstd", ZSTD.to_vec(), Some(MODEL)),
        ("compress", json(MODEL, 10), None),
        ("gzip", json(MODEL, 10), None),
        ("br", GZIP.to_vec(), None),
        ("zstd", ZSTD[..100].to_vec(), None),
        ("gzip", bomb, None),
    ];
    for missing in [MissingModel::Pass, MissingModel::Default("fallback".into())] {
        let mut stage = Stage::with(echoes, |config| {
            config.limits.decoded_body_bytes = 100_000;
            config.bbr.missing_model = missing.clone();
        })
        .await;
        for (coding, body, model) in &rows {
            let response = stage.request(&coded(coding, body.clone())).await;
            unchanged(&response, coding, body);
            let expected = match &missing {
                MissingModel::Default(fallback) => Some(model.unwrap_or(fallback)),
                _ => *model,
            };
            assert_eq!(response.echoed().header("x-gateway-model-name"), expected, "{coding}");
            assert_eq!(stage.epp.streams().last().unwrap().request_body().0, *body, "{coding}");
        }
    }
    let mut stage = Stage::with(Production::new, |config| config.bbr.missing_model = MissingModel::Reject).await;
    let response = stage.request(&coded("compress", json(MODEL, 10))).await;
    assert_eq!((response.status(), response.error_code().as_str()), (415, "content_coding"));
}

/// A body that names [`MODEL`], in UTF-16 with a byte order mark.
fn utf16(order: fn(u16) -> [u8; 2]) -> Vec<u8> {
    format!("\u{feff}{{\"model\":\"{MODEL}\"}}").encode_utf16().flat_map(order).collect()
}

/// It names no model that the agent reads, whatever the rule for such bodies.
#[tokio::test]
async fn utf16_body_follows_the_rule_for_a_missing_model() {
    let bodies = [utf16(u16::to_le_bytes), utf16(u16::to_be_bytes)];
    let (agent, servers) = routed(true, |config| config.bbr.missing_model = MissingModel::Reject).await;
    for body in &bodies {
        let response = ask(&agent, &coded("", body.clone())).await;
        assert_eq!((response.status(), response.error_code().as_str()), (400, "model_missing"), "{}", response.text());
    }
    assert_eq!((servers[0].requests(), servers[1].requests()), (0, 0));
    let fallback = |model: &str| MissingModel::Default(model.to_owned());
    for (model, first) in [(MODEL, true), ("another", false)] {
        let (agent, servers) = routed(true, |config| config.bbr.missing_model = fallback(model)).await;
        for body in &bodies {
            let response = ask(&agent, &coded("", body.clone())).await;
            assert_eq!(response.served_by(), Some(servers[usize::from(!first)].addr), "{model}");
            unchanged(&response, "", body);
            assert_eq!(response.echoed().header("x-gateway-model-name"), Some(model));
        }
    }
}

/// D13: marks and encodings that JSON forbids but clients send.
#[tokio::test]
async fn byte_order_mark_and_utf16_are_accepted() {
    let (agent, servers) = routed(true, |_| {}).await;
    let marked = [b"\xef\xbb\xbf", &json(MODEL, 100)[..]].concat();
    for (body, first) in [(marked, true), (utf16(u16::to_le_bytes), false), (utf16(u16::to_be_bytes), false)] {
        let response = ask(&agent, &coded("", body.clone())).await;
        assert_eq!(response.served_by(), Some(servers[usize::from(!first)].addr));
        unchanged(&response, "", &body);
        let response = ask(&agent, &coded("gzip", gzip(&body))).await;
        assert_eq!(response.served_by(), Some(servers[usize::from(!first)].addr), "within a coding");
    }
}

/// An EPP that replaces the body: the client's fields about its body are removed, the EPP's stay.
#[tokio::test]
async fn digests_and_coding_of_replaced_body_are_removed() {
    const DIGESTS: [&str; 4] = ["content-md5", "digest", "content-digest", "repr-digest"];
    let echoing = |replace: bool| {
        move |all: &[std::net::SocketAddr]| {
            let named = all[0].to_string();
            Answering::new(move |exchange| {
                // Echoes every field, as production EPPs do.
                let fields: Vec<(&str, &str)> = exchange
                    .request_headers
                    .iter()
                    .filter(|(name, _)| !name.starts_with(':'))
                    .map(|(name, value)| (name.as_str(), value.as_str()))
                    .filter(|(name, _)| header(&exchange.request_headers, "x-epp").is_none() || *name != "digest")
                    .collect();
                let own = header(&exchange.request_headers, "x-epp").map(|value| ("digest", value));
                let fields: Vec<_> = fields.into_iter().chain(own).collect();
                let body = if replace { json("renamed", 1000) } else { exchange.request_body.clone() };
                let mut replies = vec![reply::pick(&named, &fields)];
                replies.extend(reply::request_body(&body.into()));
                replies
            })
        }
    };
    let with_digests =
        |body: Vec<u8>| DIGESTS.iter().fold(coded("gzip", body), |request, name| request.header(name, "of-the-client"));
    let mut same = Stage::new(echoing(false)).await;
    let echo = same.request(&with_digests(GZIP.to_vec())).await.echoed();
    for name in DIGESTS {
        assert_eq!(echo.header(name), Some("of-the-client"), "{name}");
    }
    assert_eq!(echo.header("content-encoding"), Some("gzip"));

    let mut other = Stage::new(echoing(true)).await;
    let echo = other.request(&with_digests(GZIP.to_vec())).await.echoed();
    assert_eq!(echo.body_hash, Fnv::of(&json("renamed", 1000)).value());
    for name in DIGESTS.iter().chain(&["content-encoding"]) {
        assert_eq!(echo.header(name), None, "{name}");
    }
    let echo = other.request(&with_digests(GZIP.to_vec()).header("x-epp", "of-the-epp")).await.echoed();
    assert_eq!((echo.header("digest"), echo.header("content-digest")), (Some("of-the-epp"), None));
}
