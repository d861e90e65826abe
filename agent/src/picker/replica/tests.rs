//! Tests of the replicas' order and state.

use super::*;
use crate::config::Epp;

fn replicas(addresses: &[&str]) -> Replicas {
    let addresses = addresses.iter().map(ToString::to_string).collect();
    Replicas::new(&Epp { addresses, ..Epp::new("") }).unwrap()
}

fn ips(list: &[&str]) -> Vec<IpAddr> {
    list.iter().map(|address| address.parse().unwrap()).collect()
}

fn known(replicas: &Replicas) -> Vec<String> {
    replicas.snapshot().replicas.iter().map(|replica| replica.address.to_string()).collect()
}

/// The order in which the replicas are asked.
fn order(replicas: &Replicas, now: Instant) -> Vec<u16> {
    let (snapshot, mut asked) = (replicas.snapshot(), Vec::new());
    while let Some(best) = snapshot.best(&asked, now) {
        asked.push(best.address.clone());
    }
    let port = |address: &ReplicaAddress| match address {
        ReplicaAddress::Tcp(address) => address.port(),
        ReplicaAddress::Unix(_) => 0,
    };
    asked.iter().map(port).collect()
}

#[test]
fn serving_replicas_come_first_in_order() {
    use ReplicaState::{NotServing, Serving, Unknown, Unreachable};
    let replicas = replicas(&["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3", "10.0.0.1:4"]);
    let now = Instant::now();
    for (states, expected) in [
        ([Unknown, Unknown, Unknown, Unknown], [1, 2, 3, 4]),
        ([NotServing, Serving, Unknown, Unreachable], [2, 3, 1, 4]),
        ([Unreachable, NotServing, Unreachable, NotServing], [2, 4, 1, 3]),
        ([Unreachable, Unreachable, Unreachable, Unreachable], [1, 2, 3, 4]),
        ([NotServing, NotServing, NotServing, Serving], [4, 1, 2, 3]),
    ] {
        for (replica, state) in replicas.snapshot().replicas.iter().zip(states) {
            replica.set_state(state);
            assert_eq!(replica.state(), state);
        }
        assert_eq!(order(&replicas, now), expected, "{states:?}");
    }
}

#[test]
fn penalty_ends_after_five_seconds_or_an_answer() {
    let replicas = replicas(&["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3"]);
    let all = replicas.snapshot().replicas;
    all[2].set_state(ReplicaState::NotServing);
    let now = Instant::now();
    all[0].failed(now);
    // It may still serve, so it ranks above one that reports not serving.
    assert_eq!(order(&replicas, now), [2, 1, 3]);
    assert_eq!(order(&replicas, now + PENALTY - Duration::from_millis(2)), [2, 1, 3]);
    assert_eq!(order(&replicas, now + PENALTY), [1, 2, 3]);
    all[0].answered();
    assert_eq!(order(&replicas, now), [1, 2, 3]);
}

#[test]
fn resolved_replicas_keep_the_order_of_entries_and_their_state() {
    let replicas = replicas(&["epp.test:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    assert_eq!(replicas.names().collect::<Vec<_>>(), [(0, "epp.test")]);
    assert_eq!(known(&replicas), ["10.0.0.9:9002", "[fd00::1]:9003"]);
    replicas.resolved(0, ips(&["10.0.0.2", "10.0.0.1"]));
    assert_eq!(known(&replicas), ["10.0.0.1:9002", "10.0.0.2:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    let second = Arc::clone(&replicas.snapshot().replicas[1]);
    assert_eq!((second.authority.as_str(), second.name.to_str().as_ref()), ("epp.test:9002", "epp.test"));
    second.set_state(ReplicaState::NotServing);
    // One address is removed, one stays, one is added, and one also belongs to another entry.
    replicas.resolved(0, ips(&["10.0.0.2", "10.0.0.3", "10.0.0.9"]));
    assert_eq!(known(&replicas), ["10.0.0.2:9002", "10.0.0.3:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    assert_eq!(replicas.snapshot().replicas[0].state(), ReplicaState::NotServing);
    replicas.unresolved("no answer");
    assert_eq!(known(&replicas).len(), 4, "the previous addresses are kept");
}

#[tokio::test(start_paused = true)]
async fn unresolved_name_is_awaited_until_the_first_answer() {
    let replicas = Arc::new(replicas(&["epp.test:9002"]));
    let begin = tokio::time::Instant::now();
    let error = replicas.known().await.unwrap_err();
    assert_eq!((error.reason(), begin.elapsed()), ("unresolved", replicas.settings.connect_timeout));

    let waiting = tokio::spawn({
        let replicas = Arc::clone(&replicas);
        async move { replicas.known().await }
    });
    tokio::task::yield_now().await;
    replicas.unresolved("epp.test: no such name");
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "cannot resolve the EPP's name: epp.test: no such name");
    let begin = tokio::time::Instant::now();
    assert!(replicas.known().await.is_err() && begin.elapsed().is_zero(), "already known");

    replicas.resolved(0, ips(&["10.0.0.1"]));
    assert_eq!(replicas.known().await.unwrap().replicas.len(), 1);
}

#[test]
fn invalid_settings_are_rejected() {
    for address in ["", "epp", "http://epp:9002", "a b:1"] {
        assert!(Replicas::new(&Epp::new(address)).is_err(), "{address:?}");
    }
    let tls = config::ServerTls::Ca("no/such/file".into());
    assert!(Replicas::new(&Epp { tls, ..Epp::new("epp:9002") }).is_err());
}

/// A new process has no history.
#[test]
fn replica_that_is_reached_again_is_not_stalled() {
    let replicas = replicas(&["10.0.0.1:1"]);
    let replica = Arc::clone(&replicas.snapshot().replicas[0]);
    assert!(replica.stall());
    replica.reached();
    assert!(replica.is_stalled(), "another connection to the same process");
    assert!(replica.begin_probe());
    replica.unreachable(&Arc::new(io::ErrorKind::ConnectionRefused.into()));
    assert!(replica.is_stalled());
    replica.reached();
    assert!(!replica.is_stalled() && !replica.begin_probe());
    assert!(replica.stall() && !replica.begin_probe(), "the first probe is in progress");
    replica.probe_ended();
    assert!(replica.begin_probe());
}
