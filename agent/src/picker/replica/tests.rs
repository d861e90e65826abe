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

/// The order in which they are asked.
fn order(replicas: &Replicas, now: Instant) -> Vec<u16> {
    let (snapshot, mut asked) = (replicas.snapshot(), Vec::new());
    while let Some(best) = snapshot.best(&asked, now) {
        asked.push(best.address);
    }
    asked.iter().map(SocketAddr::port).collect()
}

#[test]
fn those_that_serve_come_first_and_keep_their_order() {
    use State::{NotServing, Serving, Unknown, Unreachable};
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
fn a_penalty_is_over_after_five_seconds_or_an_answer() {
    let replicas = replicas(&["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3"]);
    let all = replicas.snapshot().replicas;
    all[2].set_state(State::NotServing);
    let now = Instant::now();
    all[0].failed(now);
    // It may serve all the same, so it comes before one that says it does not.
    assert_eq!(order(&replicas, now), [2, 1, 3]);
    assert_eq!(order(&replicas, now + PENALTY - Duration::from_millis(2)), [2, 1, 3]);
    assert_eq!(order(&replicas, now + PENALTY), [1, 2, 3]);
    all[0].answered();
    assert_eq!(order(&replicas, now), [1, 2, 3]);
}

#[test]
fn names_are_found_in_the_order_of_the_entries_and_keep_their_state() {
    let replicas = replicas(&["epp.test:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    assert_eq!(replicas.names().collect::<Vec<_>>(), [(0, "epp.test")]);
    assert_eq!(known(&replicas), ["10.0.0.9:9002", "[fd00::1]:9003"]);
    replicas.resolved(0, ips(&["10.0.0.2", "10.0.0.1"]));
    assert_eq!(known(&replicas), ["10.0.0.1:9002", "10.0.0.2:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    let second = Arc::clone(&replicas.snapshot().replicas[1]);
    assert_eq!((second.authority.as_str(), second.name.to_str().as_ref()), ("epp.test:9002", "epp.test"));
    second.set_state(State::NotServing);
    // One goes, one stays, one comes, and one is another entry's too.
    replicas.resolved(0, ips(&["10.0.0.2", "10.0.0.3", "10.0.0.9"]));
    assert_eq!(known(&replicas), ["10.0.0.2:9002", "10.0.0.3:9002", "10.0.0.9:9002", "[fd00::1]:9003"]);
    assert_eq!(replicas.snapshot().replicas[0].state(), State::NotServing);
    replicas.unresolved("no answer");
    assert_eq!(known(&replicas).len(), 4, "what it was found to be before holds");
}

#[tokio::test(start_paused = true)]
async fn a_name_is_waited_for_until_there_is_an_answer() {
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
    assert_eq!(error.to_string(), "the EPP's name has no address: epp.test: no such name");
    let begin = tokio::time::Instant::now();
    assert!(replicas.known().await.is_err() && begin.elapsed().is_zero(), "known by now");

    replicas.resolved(0, ips(&["10.0.0.1"]));
    assert_eq!(replicas.known().await.unwrap().replicas.len(), 1);
}

#[test]
fn settings_that_cannot_work_are_refused() {
    for address in ["", "epp", "http://epp:9002", "a b:1"] {
        assert!(Replicas::new(&Epp::new(address)).is_err(), "{address:?}");
    }
    let tls = config::EppTls::Ca("no/such/file".into());
    assert!(Replicas::new(&Epp { tls, ..Epp::new("epp:9002") }).is_err());
}
