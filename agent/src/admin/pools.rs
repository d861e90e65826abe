//! `GET /pools`: the endpoints of each pool and the replicas of its EPP, as this agent sees them now.

use std::time::Instant;

use serde_json::{Value, json};

use crate::{config::Picker, endpoint::member::Endpoint, picker::replica::Replica, shared::Shared};

/// An array with an object for each pool, in the order of the configuration.
pub fn describe(shared: &Shared, now: Instant) -> Value {
    let pools = shared.config.pools.iter().enumerate().map(|(index, pool)| {
        let endpoints = shared.endpoints[index].snapshot();
        let endpoints: Vec<Value> = endpoints.endpoints().iter().map(|one| endpoint(one, now)).collect();
        let replicas = shared.replicas[index].as_ref().map(|replicas| replicas.snapshot()).unwrap_or_default();
        let replicas: Vec<Value> = replicas.replicas.iter().map(|one| replica(one)).collect();
        let picker = match pool.picker {
            Picker::Builtin => "builtin",
            Picker::Epp(_) => "epp",
        };
        json!({ "name": pool.name, "picker": picker, "endpoints": endpoints, "replicas": replicas })
    });
    pools.collect()
}

fn endpoint(endpoint: &Endpoint, now: Instant) -> Value {
    json!({
        "address": endpoint.address.to_string(),
        "state": endpoint.state().as_str(),
        "in_flight": endpoint.in_flight(),
        "ejected_ms": endpoint.ejected_for(now).map(|time| time.as_millis() as u64),
        "node": endpoint.node,
        "zone": endpoint.zone,
    })
}

fn replica(replica: &Replica) -> Value {
    json!({
        "address": replica.address.to_string(),
        "health": replica.state().label(),
        "decisions": replica.decisions(),
        "stalled": replica.is_stalled(),
        "unreachable": replica.why_unreachable().map(|why| why.to_string()),
    })
}
