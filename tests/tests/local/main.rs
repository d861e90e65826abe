//! The path `local`, on which an endpoint's own `sendmsg` reaches the client: for every endpoint and way of sending, every
//! location on this machine and every end.

mod owned;
mod pods;
mod posts;
mod pressure;
mod scope;
mod senders;
mod servers;
mod shared;
mod urgent;

use penstock_tests::{BodyEnd, Client, Plan, Reader, TestAgent};

/// Body bytes carried by this path.
fn carried(agent: &TestAgent, path: &str) -> u64 {
    agent.count("penstock_body_bytes_total", &[&format!("path=\"{path}\"")])
}

fn stops(agent: &TestAgent, reason: &str) -> u64 {
    agent.count("penstock_steer_stops_total", &[&format!("reason=\"{reason}\"")])
}

/// Asserts one complete and exact response on this connection.
async fn is_exact(client: &mut Client, plan: &Plan) {
    client.send(&plan.request()).await.unwrap();
    let head = client.head().await.unwrap_or_else(|error| panic!("{error:#}: {plan:?}"));
    assert_eq!(head.status, 200, "{plan:?}");
    let read = Reader::Fast.take(client, &mut plan.checker()).await;
    let read = read.unwrap_or_else(|error| panic!("{error:#}: {plan:?}"));
    assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{plan:?}");
}
