//! What the nginx module ngx-inference does, and its shortcomings. The rest of its feature list is tested elsewhere
//! (`docs/configuration.md` says where).

use penstock_agent::config::{Config, Picker};
use penstock_proto::ext_proc::processing_request::Request as Told;
use penstock_tests::{
    Stage,
    agent::builtin_pool,
    scripted_epp::Production,
    stage::{echo, json},
};

/// The module's test matrix: reading the model and asking a picker, each on and off.
#[tokio::test]
async fn every_combination_of_model_and_picker_is_served() {
    for (reads_model, asks) in [(false, false), (false, true), (true, false), (true, true)] {
        let adjust = |config: &mut Config| {
            config.bbr.enabled = reads_model;
            if !asks {
                config.pools[0].picker = Picker::Builtin;
            }
        };
        let mut stage = Stage::with(|all| Production::new(&all[1..]), adjust).await;
        for turn in 1..=2 {
            let response = stage.request(&echo(json("llama", 1000))).await;
            let seen = response.echoed();
            assert_eq!(seen.header("x-gateway-model-name"), reads_model.then_some("llama"), "{reads_model} {asks}");
            assert_eq!(stage.epp.streams_started(), if asks { turn } else { 0 }, "{reads_model} {asks}");
            assert!(!asks || response.served_by() == Some(stage.two.addr));
        }
    }
}

/// The module's locations cannot switch off what the server enables.
#[tokio::test]
async fn pool_without_picker_coexists_with_pool_with_picker() {
    let mut stage = Stage::with(Production::new, |config| {
        let mut plain = builtin_pool(&[]);
        plain.name = "plain".to_owned();
        plain.endpoints = config.pools[0].endpoints.clone();
        config.pools.push(plain);
        let text = "[[pools]]\nname = \"plain\"\nendpoints = [\"10.0.0.1:1\"]\n\
                    [[pools]]\nname = \"default\"\nendpoints = [\"10.0.0.1:1\"]\n\
                    [[routes]]\nheaders = [{ name = \"x-plain\" }]\npool = \"plain\"\n[[routes]]\npool = \"default\"\n";
        config.routes = Config::parse(text, "test.toml").unwrap().routes;
    })
    .await;
    for asked in 1..=3 {
        assert_eq!(stage.request(&echo(json("m", 10)).header("x-plain", "")).await.status(), 200);
        assert_eq!(stage.epp.streams_started(), asked - 1);
        assert_eq!(stage.request(&echo(json("m", 10))).await.status(), 200);
        assert_eq!(stage.epp.streams_started(), asked);
    }
}

/// The module polls for picks every 10 ms, so none takes less. Here most take a fraction of that; a few fast ones are enough as
/// proof on a busy machine.
#[tokio::test]
async fn pick_is_used_without_timer_delay() {
    let mut stage = Stage::new(Production::new).await;
    for _ in 0..1000 {
        assert_eq!(stage.request(&echo(json("m", 100))).await.status(), 200);
        let quick = [r#"le="0.005""#, r#"outcome="picked""#];
        if stage.agent.count("penstock_epp_exchange_seconds_bucket", &quick) >= 10 {
            return;
        }
    }
    panic!("fewer than ten of a thousand picks took less than 5 ms");
}

/// The module treats values as text, which damages bytes beyond UTF-8.
#[tokio::test]
async fn field_values_are_forwarded_as_bytes() {
    let mut stage = Stage::new(Production::new).await;
    let response = stage.request(&echo(json("m", 10)).header("x-odd", "caf\u{e9}")).await;
    assert_eq!(response.status(), 200);
    let stream = &stage.epp.streams()[0];
    let Some(Told::RequestHeaders(head)) = &stream.messages[0].request else { panic!("{:?}", stream.kinds()) };
    let headers = &head.headers.as_ref().unwrap().headers;
    assert!(headers.iter().all(|header| header.value.is_empty() && !header.raw_value.is_empty()), "{headers:?}");
    let odd = headers.iter().find(|header| header.key == "x-odd").unwrap();
    assert_eq!(odd.raw_value.as_ref(), "caf\u{e9}".as_bytes());
}
