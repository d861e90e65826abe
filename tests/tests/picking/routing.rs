//! Requests reach the picked endpoint.

use penstock_tests::{
    Refusing, Request, Stage,
    scripted_epp::{Answering, Endpoints, Production, reply},
    stage::echo,
};

#[tokio::test]
async fn each_request_of_a_connection_follows_its_own_pick() {
    let mut stage = Stage::new(Production::new).await;
    let mut served = Vec::new();
    for _ in 0..6 {
        served.push(stage.request(&echo(r#"{"model":"m"}"#)).await.served_by().unwrap());
    }
    assert_eq!(served, [stage.one.addr, stage.two.addr].repeat(3));
    assert_eq!(stage.epp.streams_started(), 6);
    assert!(stage.epp.connections_accepted() <= stage.workers(), "{}", stage.epp.connections_accepted());
}

#[tokio::test]
async fn request_without_body_is_picked() {
    let mut stage = Stage::new(|all| Production::over(Endpoints::new(&all[1..]))).await;
    let response = stage.request(&Request::get("/test/echo")).await;
    assert_eq!(response.echoed().body_framing, "none");
    assert_eq!(stage.requests(), (0, 1));
}

#[tokio::test]
async fn pick_in_header_alone_is_followed() {
    let mut stage = Stage::new(|all| {
        let picked = all[1].to_string();
        Answering::new(move |_| vec![reply::request_headers(reply::mutation(&[(reply::DESTINATION, &picked)]))])
    })
    .await;
    assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr));
}

#[tokio::test]
async fn pick_in_metadata_alone_is_followed() {
    let mut stage = Stage::new(|all| {
        let picked = all[1].to_string();
        Answering::new(move |_| {
            let mut message = reply::request_headers(reply::mutation(&[]));
            message.dynamic_metadata = Some(reply::destination(&picked));
            vec![message]
        })
    })
    .await;
    assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr));
}

#[tokio::test]
async fn metadata_takes_precedence_over_header() {
    let mut stage = Stage::new(|all| {
        let (by_header, by_metadata) = (all[0].to_string(), all[1].to_string());
        Answering::new(move |_| {
            let mut message = reply::request_headers(reply::mutation(&[(reply::DESTINATION, &by_header)]));
            message.dynamic_metadata = Some(reply::destination(&by_metadata));
            vec![message]
        })
    })
    .await;
    assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr));
}

#[tokio::test]
async fn endpoint_connections_are_kept() {
    let mut stage = Stage::new(Production::new).await;
    for turn in 1..=3 {
        for _ in 0..2 {
            assert_eq!(stage.request(&echo(r#"{"model":"m"}"#)).await.echoed().count, turn);
        }
    }
    assert_eq!((stage.one.connections_accepted(), stage.two.connections_accepted()), (1, 1));
    assert_eq!(stage.agent.metric("penstock_endpoint_connections_total", &[r#"result="reused""#]), 4.0);
}

/// The fields with which a client could pose as the gateway or picker.
const CONTROL: [&str; 7] = [
    "x-gateway-destination-endpoint",
    "X-Gateway-Destination-Endpoint",
    "x_gateway_destination_endpoint",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-prefiller-host-port",
    "x-envoy-original-dst-host",
];

fn posing(as_picked: &str) -> Request {
    CONTROL.iter().fold(echo(r#"{"model":"m"}"#), |request, name| request.header(name, as_picked))
}

/// E21.
#[tokio::test]
async fn control_fields_from_client_reach_neither_picker_nor_endpoint() {
    let mut stage = Stage::new(|all| Production::over(Endpoints::new(&all[1..]))).await;
    let seen = stage.request(&posing(&stage.one.addr.to_string())).await.echoed();
    let asked = stage.epp.streams()[0].request_headers();
    for name in CONTROL {
        assert_eq!(seen.header(name), None, "{name}");
        assert!(!asked.iter().any(|(asked, _)| asked.eq_ignore_ascii_case(name)), "{name}");
    }
    assert_eq!(stage.one.connections_accepted(), 0);
}

/// E12, E21: also if the picker names no endpoint.
#[tokio::test]
async fn destination_header_from_client_is_ignored() {
    let mut stage = Stage::new(|_| Answering::new(|_| vec![reply::request_headers(reply::mutation(&[]))])).await;
    let response = stage.request(&posing(&stage.one.addr.to_string())).await;
    assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"));
    assert_eq!((stage.one.connections_accepted(), stage.two.connections_accepted()), (0, 0));
}

/// Always returns the same list.
fn list(named: String) -> impl penstock_tests::scripted_epp::Script {
    Answering::new(move |_| vec![reply::pick(&named, &[])])
}

/// E10.
#[tokio::test]
async fn dead_first_choice_is_followed_by_second() {
    let dead = Refusing::new().unwrap();
    let mut stage = Stage::with(
        |all| list(format!("{}, {}", dead.addr, all[1])),
        |config| config.pools[0].endpoints.push(dead.addr.into()),
    )
    .await;
    let body = penstock_tests::stage::json("m", 1000);
    let hash = penstock_tests::content::Fnv::of(&body).value();
    let response = stage.request(&echo(body)).await;
    assert_eq!(response.served_by(), Some(stage.two.addr));
    assert_eq!(response.echoed().body_hash, hash);
    assert_eq!(stage.epp.streams()[0].served(), Some(stage.two.addr.to_string()));
}

/// E10: nothing outside the list is tried.
#[tokio::test]
async fn list_of_dead_endpoints_returns_502() {
    let (dead, too) = (Refusing::new().unwrap(), Refusing::new().unwrap());
    let mut stage = Stage::with(
        |_| list(format!("{},{}", dead.addr, too.addr)),
        |config| config.pools[0].endpoints.extend([dead.addr.into(), too.addr.into()]),
    )
    .await;
    let response = stage.request(&echo("{}")).await;
    assert_eq!((response.status(), response.error_code().as_str()), (502, "connect"));
    assert_eq!(stage.requests(), (0, 0));
}

/// E10: endpoints outside the pool are not dialled.
#[tokio::test]
async fn endpoint_outside_pool_in_list_is_skipped() {
    let mut stage = Stage::with(
        |all| list(format!("{},{}", all[0], all[1])),
        |config| {
            config.pools[0].endpoints.remove(0);
        },
    )
    .await;
    assert_eq!(stage.request(&echo("{}")).await.served_by(), Some(stage.two.addr));
    assert_eq!(stage.one.connections_accepted(), 0);
}
