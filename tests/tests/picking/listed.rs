//! `GET /pools` on the admin port.

use penstock_tests::{Client, Plan, Request, Stage, eventually, model_server::HeadWrites, scripted_epp::Production};
use serde_json::Value;

use crate::SOON;

async fn pools(stage: &Stage) -> Value {
    let mut admin = Client::connect(stage.agent.agent.admin_address()).await.unwrap();
    admin.request(&Request::get("/pools")).await.unwrap().json().unwrap()
}

#[tokio::test]
async fn endpoints_and_replicas_of_each_pool_are_listed() {
    let stage = Stage::new(|all| Production::new(&all[..1])).await;
    // The first endpoint gets a request, and does not answer it.
    let head = HeadWrites { split_at: Some(0), pause_us: 3_600_000_000, ..HeadWrites::default() };
    let mut client = Client::connect(stage.agent.addr).await.unwrap();
    client.send(&Plan { head, ..Plan::default() }.request()).await.unwrap();
    eventually(SOON, || stage.one.requests() == 1).await;

    let list = pools(&stage).await;
    let pool = &list[0];
    assert_eq!((list.as_array().unwrap().len(), &pool["name"], &pool["picker"]), (1, &"default".into(), &"epp".into()));
    let endpoints = pool["endpoints"].as_array().unwrap().iter().map(|endpoint| {
        assert!(endpoint["state"] == "ready" && endpoint["ejected_ms"].is_null(), "{list}");
        (endpoint["address"].as_str().unwrap().parse().unwrap(), endpoint["in_flight"].as_u64().unwrap())
    });
    assert_eq!(endpoints.collect::<Vec<_>>(), [(stage.one.addr, 1), (stage.two.addr, 0)]);
    let replicas = pool["replicas"].as_array().unwrap();
    assert!(replicas.len() == 1 && replicas[0]["stalled"] == false, "{list}");
    assert_eq!(replicas[0]["address"], stage.epp.addr.to_string());
    assert!(replicas[0]["decisions"] == 1 && replicas[0]["unreachable"].is_null(), "{list}");

    drop(client);
    eventually(SOON, || stage.agent.metric("penstock_active_requests", &[]) == 0.0).await;
    let list = pools(&stage).await;
    assert_eq!(list[0]["endpoints"][0]["in_flight"], 0, "{list}");
}
