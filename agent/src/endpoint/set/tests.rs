use std::time::Duration;

use super::*;

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

fn listed(numbers: impl IntoIterator<Item = u8>) -> Vec<config::ListedEndpoint> {
    numbers.into_iter().map(|n| address(n).into()).collect()
}

fn set(endpoints: u8) -> EndpointSet {
    EndpointSet::of(listed(1..=endpoints), Ejection { failures: 1, ..Ejection::default() })
}

fn addresses(set: &EndpointSet) -> Vec<SocketAddr> {
    set.snapshot().endpoints().iter().map(|endpoint| endpoint.address).collect()
}

#[test]
fn set_is_the_union_and_the_first_source_wins() {
    let set = set(2);
    let named = config::ListedEndpoint { zone: Some("a".into()), ..address(2).into() };
    assert!(set.replace(EndpointSource::Dns, vec![address(3).into(), address(3).into()]));
    assert!(set.replace(EndpointSource::File, vec![named, address(4).into()]));
    assert_eq!(addresses(&set), [1, 2, 4, 3].map(address));
    assert_eq!(set.snapshot().get(address(2)).unwrap().zone, None);
    assert!(set.replace(EndpointSource::File, vec![]));
    assert!(!set.replace(EndpointSource::File, vec![]), "unchanged");
    assert_eq!(addresses(&set), [1, 2, 3].map(address));
}

#[test]
fn endpoint_that_stays_keeps_its_state_and_one_that_returns_is_new() {
    let (set, now) = (set(3), Instant::now());
    let running = [set.begin(address(1), now), set.begin(address(1), now)];
    set.failed(address(1), now);
    set.replace(
        EndpointSource::Config,
        vec![config::ListedEndpoint { draining: true, ..address(1).into() }, address(2).into()],
    );
    let one = |set: &EndpointSet| {
        let snapshot = set.snapshot();
        let endpoint = snapshot.get(address(1)).unwrap();
        (endpoint.id(), endpoint.in_flight(), endpoint.is_avoided(now), endpoint.state())
    };
    let (id, ..) = one(&set);
    assert_eq!(one(&set), (id, 2, true, EndpointState::Draining));
    assert_eq!(set.states(), [1, 0, 0, 1]);
    assert_eq!(set.snapshot().ready().count(), 1);
    set.replace(EndpointSource::Config, listed([2]));
    set.replace(EndpointSource::Config, listed([1, 2]));
    assert_eq!(one(&set), (4, 0, false, EndpointState::Ready));
    drop(running);
    assert_eq!(one(&set), (4, 0, false, EndpointState::Ready));
}

#[test]
fn ejections_are_limited_and_spare_the_last_endpoint() {
    for (endpoints, percent, most) in [(1, 100, 0), (2, 50, 1), (3, 50, 1), (4, 50, 2), (4, 100, 3), (4, 24, 0)] {
        let rules = Ejection { failures: 1, max_percent: percent, ..Ejection::default() };
        let (set, now) = (EndpointSet::of(listed(1..=endpoints), rules), Instant::now());
        let ejected = (1..=endpoints).filter(|&n| set.failed(address(n), now)).count();
        assert_eq!(ejected, most, "{endpoints} endpoints, {percent} %");
    }
}

#[test]
fn avoided_endpoints_move_to_the_end() {
    let (set, now) = (set(4), Instant::now());
    set.failed(address(1), now);
    set.failed(address(3), now);
    let mut list = [1, 9, 3, 2].map(address);
    set.avoided_last(&mut list, now);
    assert_eq!(list, [9, 2, 1, 3].map(address));
}

#[track_caller]
fn assert_hint(hint: Option<Arc<[SocketAddr]>>, expected: Option<&[u8]>) {
    let expected = expected.map(|numbers| numbers.iter().map(|&n| address(n)).collect::<Vec<_>>());
    assert_eq!(hint.map(|hint| hint.to_vec()), expected);
}

#[test]
fn avoided_endpoints_are_left_out_of_hints_while_others_are_left() {
    let mut pool = config::Pool::new("p", [1, 2, 3].map(address));
    pool.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
    let new = |pool: &config::Pool| (EndpointSet::new(pool, &Node::default()), Instant::now());
    let (set, now) = new(&pool);
    assert_hint(set.hint(now), None);
    set.failed(address(2), now);
    assert_hint(set.hint(now), Some(&[1, 3]));
    set.failed(address(1), now);
    assert_hint(set.hint(now), Some(&[3]));
    assert_hint(set.hint(now + Duration::from_secs(3600)), None);

    pool.subset.endpoints = [1, 2].map(address).into();
    let (set, now) = new(&pool);
    assert_hint(set.hint(now), Some(&[1, 2]));
    set.failed(address(1), now);
    assert_hint(set.hint(now), Some(&[2]));
    set.failed(address(2), now);
    assert_hint(set.hint(now), Some(&[1, 2]));

    // The EPP may know endpoints that the agent does not.
    (pool.subset.endpoints, pool.passthrough) = (Vec::new(), config::Passthrough::On);
    let (set, now) = new(&pool);
    set.failed(address(1), now);
    assert_hint(set.hint(now), None);
}

#[test]
fn second_hint_lacks_the_dead_endpoints() {
    let mut pool = config::Pool::new("p", [1, 2, 3].map(address));
    pool.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
    let (set, now) = (EndpointSet::new(&pool, &Node::default()), Instant::now());
    assert_hint(set.hint_without(&[address(1)], now), Some(&[2, 3]));
    set.failed(address(2), now);
    assert_hint(set.hint_without(&[address(1)], now), Some(&[3]));
    assert_hint(set.hint_without(&[1, 3].map(address), now), Some(&[2]));
    assert_hint(set.hint_without(&[1, 2, 3].map(address), now), None);

    pool.passthrough = config::Passthrough::On;
    let (set, now) = (EndpointSet::new(&pool, &Node::default()), Instant::now());
    for n in [8, 9, 1] {
        set.succeeded(address(n), now);
    }
    assert_hint(set.hint_without(&[address(1)], now), Some(&[2, 3, 8, 9]));
    set.failed(address(9), now);
    assert_hint(set.hint_without(&[1, 2].map(address), now), Some(&[3, 8]));
}

#[test]
fn unknown_address_is_not_counted() {
    let (set, now) = (set(1), Instant::now());
    let _unknown = set.begin(address(9), now);
    assert!(!set.failed(address(9), now));
    set.succeeded(address(9), now);
    assert_eq!(addresses(&set), [address(1)]);
}

/// Puts `pool` into force after `set`, which has the settings `before`.
fn reloaded(set: &EndpointSet, before: &config::Pool, pool: &config::Pool) -> EndpointSet {
    let after = EndpointSet::after(set, pool, &Node::default());
    after.configure(before, pool, Instant::now());
    after
}

#[test]
fn reloaded_set_keeps_endpoints_and_their_state() {
    let (before, now) = (set(3), Instant::now());
    let (file, dns) = (Some("/e".into()), Some(config::NamedEndpoints { name: "a".into(), ports: vec![1] }));
    let settings = config::Pool { endpoints_file: file, endpoints_dns: dns, ..config::Pool::new("p", []) };
    before.replace(EndpointSource::Dns, listed([7]));
    before.replace(EndpointSource::File, listed([8]));
    let _running = before.begin(address(1), now);
    before.failed(address(1), now);
    let pool =
        config::Pool { endpoints: [1, 4].map(|n| address(n).into()).into(), endpoints_file: None, ..settings.clone() };
    let after = reloaded(&before, &settings, &pool);
    assert_eq!(addresses(&after), [1, 4, 7].map(address), "the file is no longer configured");
    let snapshot = after.snapshot();
    let one = snapshot.get(address(1)).unwrap();
    assert!(one.in_flight() == 1 && one.is_avoided(now));
    let ids: std::collections::HashSet<_> = snapshot.endpoints().iter().map(Endpoint::id).collect();
    assert_eq!(ids.len(), 3);
}

#[test]
fn sets_of_all_configurations_have_the_same_contents_and_their_own_rules() {
    let now = Instant::now();
    let mut settings = config::Pool::new("p", [1, 2, 3].map(address));
    (settings.endpoints_file, settings.passthrough) = (Some("/e".into()), config::Passthrough::On);
    settings.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
    settings.subset.endpoints = [1, 8].map(address).into();
    let before = EndpointSet::new(&settings, &Node::default());
    let pool = config::Pool { subset: config::Subset::default(), ..settings.clone() };
    let after = reloaded(&before, &settings, &pool);
    // Changes arrive at both, whichever is told.
    let draining = config::ListedEndpoint { draining: true, ..address(8).into() };
    for (told, file, subset) in [(&after, address(8).into(), &[1, 8][..]), (&before, draining, &[1][..])] {
        told.replace(EndpointSource::File, vec![file]);
        assert!(Arc::ptr_eq(&before.snapshot(), &after.snapshot()));
        assert_hint(before.subset(now), Some(subset));
        assert_hint(after.subset(now), None);
    }
    assert!(before.failed(address(1), now) && after.snapshot().get(address(1)).unwrap().is_avoided(now));
    assert!(after.failed(address(2), now) && before.snapshot().get(address(2)).unwrap().is_avoided(now));
    assert!(!before.failed(address(3), now), "the last one of both");
    before.succeeded(address(9), now);
    assert_hint(after.hint_without(&[], now), Some(&[3, 9]));
}

#[test]
fn endpoints_of_another_file_or_name_are_outdated_until_the_new_one_gives_its_own() {
    let name = |name: &str| Some(config::NamedEndpoints { name: name.into(), ports: vec![1] });
    let settings = config::Pool {
        endpoints_file: Some("/a".into()),
        endpoints_dns: name("a"),
        ..config::Pool::new("p", [address(1)])
    };
    let others: [config::Pool; 3] = [
        config::Pool { endpoints_file: Some("/b".into()), ..settings.clone() },
        config::Pool { ports: vec![7], ..settings.clone() },
        config::Pool { endpoints_dns: name("b"), ..settings.clone() },
    ];
    let (file, dns) = (EndpointSource::File, EndpointSource::Dns);
    for (other, (source, unchanged)) in others.into_iter().zip([(file, dns), (file, dns), (dns, file)]) {
        let before = EndpointSet::new(&settings, &Node::default());
        before.replace(EndpointSource::File, listed([2]));
        before.replace(EndpointSource::Dns, listed([3]));
        let after = reloaded(&before, &settings, &other);
        assert_eq!(addresses(&after), [1, 2, 3].map(address));
        let since = after.outdated_since(source).unwrap();
        // Another reload meanwhile does not extend the time.
        let after = reloaded(&after, &other, &config::Pool { default_upstream: Some(address(9)), ..other.clone() });
        assert_eq!(after.outdated_since(source), Some(since), "{source:?}");
        assert_eq!(after.outdated_since(unchanged), None);
        // The new source may give the same endpoints.
        let same = after.contents.changing.lock().listed[source as usize].clone();
        assert!(!after.replace(source, same) && after.remove_outdated(source) == 0);
        assert_eq!(after.outdated_since(source), None);
        assert_eq!(addresses(&after), [1, 2, 3].map(address));
        let after = reloaded(&after, &other, &settings);
        assert_eq!((after.remove_outdated(source), after.remove_outdated(source)), (1, 0));
        assert_eq!(addresses(&after).len(), 2);
    }
}

#[test]
fn results_of_checks_and_ejections_that_are_switched_off_are_forgotten() {
    let now = Instant::now();
    let checks = config::HealthCheck { unhealthy_after: 1, ..config::HealthCheck::new("/".parse().unwrap()) };
    let mut settings = config::Pool::new("p", [1, 2, 3].map(address));
    settings.health = Some(checks.clone());
    settings.ejection = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
    let set = EndpointSet::new(&settings, &Node::default());
    let avoided = |set: &EndpointSet| {
        let snapshot = set.snapshot();
        [1, 2].map(|n| snapshot.get(address(n)).unwrap().is_avoided(now))
    };
    set.snapshot().get(address(1)).unwrap().checked(false, &checks);
    set.failed(address(2), now);
    let set = reloaded(&set, &settings, &settings.clone());
    assert_eq!(avoided(&set), [true, true]);
    let unchecked = config::Pool { health: None, ..settings.clone() };
    let set = reloaded(&set, &settings, &unchecked);
    assert_eq!(avoided(&set), [false, true]);
    let not_ejecting = config::Pool { ejection: Ejection { failures: 0, ..Ejection::default() }, ..unchecked.clone() };
    let set = reloaded(&set, &unchecked, &not_ejecting);
    assert_eq!(avoided(&set), [false, false]);
    assert_eq!(set.states()[EndpointState::Ready as usize], 3);
}
