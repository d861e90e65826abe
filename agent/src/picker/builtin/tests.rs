//! These tests are deterministic: time is an argument, and rotation starts at the first endpoint.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{affinity::CAPACITY, *};
use crate::{
    config::{self, Ejection},
    endpoint::set::EndpointSource,
};

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

/// A picker with endpoints that one failure ejects.
fn picker(endpoints: u8) -> BuiltinPicker {
    let rules = Ejection { failures: 1, max_percent: 100, ..Ejection::default() };
    BuiltinPicker::new(Arc::new(EndpointSet::of((1..=endpoints).map(endpoint), rules)))
}

fn in_flight(picker: &BuiltinPicker, n: u8) -> usize {
    picker.endpoints().snapshot().get(endpoint(n)).unwrap().in_flight()
}

fn hash(body: &[u8]) -> PromptHash {
    let mut hasher = PromptHasher::new();
    hasher.update(body);
    hasher.finish()
}

/// One block with this hash.
fn blocks(hash: u64) -> PromptHash {
    PromptHash { blocks: vec![hash], ..PromptHash::none() }
}

/// `blocks` blocks of `letter`.
fn prompt(letter: u8, blocks: usize) -> Vec<u8> {
    vec![letter; blocks * prompt::BLOCK]
}

fn best(picker: &BuiltinPicker, prompt: &PromptHash, now: Instant) -> SocketAddr {
    picker.pick(prompt, None, now).unwrap().endpoints[0]
}

#[test]
fn idle_endpoints_are_picked_evenly() {
    let (picker, now) = (picker(3), Instant::now());
    let mut picked = BTreeMap::new();
    for _ in 0..30 {
        *picked.entry(best(&picker, &PromptHash::none(), now)).or_insert(0) += 1;
    }
    assert_eq!(picked, (1..=3).map(|n| (endpoint(n), 10)).collect());
}

#[test]
fn busy_endpoints_are_picked_evenly() {
    let (picker, now) = (picker(3), Instant::now());
    let guards: Vec<_> = (0..30).map(|_| picker.pick_and_begin(&PromptHash::none(), None, now).unwrap().1).collect();
    for n in 1..=3 {
        assert_eq!(in_flight(&picker, n), 10);
    }
    drop(guards);
    assert_eq!(in_flight(&picker, 1), 0);
}

#[test]
fn endpoints_are_ordered_by_requests_in_flight() {
    let (picker, now) = (picker(4), Instant::now());
    let _busy = [
        picker.endpoints().begin(endpoint(1), now),
        picker.endpoints().begin(endpoint(1), now),
        picker.endpoints().begin(endpoint(2), now),
        picker.endpoints().begin(endpoint(4), now),
    ];
    let pick = picker.pick(&PromptHash::none(), None, now).unwrap();
    assert_eq!(pick.endpoints, [3, 2, 4, 1].map(endpoint));
}

#[test]
fn conversation_stays_at_the_endpoint_with_its_prefix() {
    let (picker, now) = (picker(3), Instant::now());
    let mut conversation = prompt(b'a', 2);
    let first = best(&picker, &hash(&conversation), now);
    for turn in 0..20 {
        conversation.extend(prompt(turn, 1));
        assert_eq!(best(&picker, &hash(&conversation), now), first);
        best(&picker, &PromptHash::none(), now);
    }
}

#[test]
fn longest_known_prefix_wins() {
    let (picker, now) = (picker(2), Instant::now());
    let learn = |body: &[u8], at| {
        picker.pick(&hash(body), Some(&[endpoint(at)]), now).unwrap();
    };
    let common = prompt(b's', 2);
    let long = [common.clone(), prompt(b'x', 1)].concat();
    learn(&long, 1);
    learn(&common, 2);
    assert_eq!(best(&picker, &hash(&common), now), endpoint(2));
    assert_eq!(best(&picker, &hash(&[long, prompt(b'y', 3)].concat()), now), endpoint(1));
}

#[test]
fn affinity_yields_to_load() {
    let (picker, now) = (picker(2), Instant::now());
    let hash = hash(&prompt(b'a', 4));
    assert_eq!(best(&picker, &hash, now), endpoint(1));
    let mut busy: Vec<_> = (0..AFFINITY_SLACK).map(|_| picker.endpoints().begin(endpoint(1), now)).collect();
    assert_eq!(best(&picker, &hash, now), endpoint(1), "within the slack");
    busy.push(picker.endpoints().begin(endpoint(1), now));
    assert_eq!(best(&picker, &hash, now), endpoint(2), "beyond the slack");
    drop(busy);
    assert_eq!(best(&picker, &hash, now), endpoint(2), "it knows the prefix now");
}

#[test]
fn ejected_endpoint_is_last_and_its_prefixes_move() {
    let (picker, now) = (picker(2), Instant::now());
    let hash = hash(&prompt(b'a', 4));
    assert_eq!(best(&picker, &hash, now), endpoint(1));
    assert!(picker.endpoints().failed(endpoint(1), now));
    for _ in 0..4 {
        assert_eq!(
            picker.pick(&hash, None, now).unwrap().endpoints,
            [2, 1].map(endpoint),
            "the ejected endpoint is last"
        );
    }
    picker.endpoints().succeeded(endpoint(1), now);
    picker.endpoints().failed(endpoint(2), now);
    assert_eq!(picker.pick(&hash, None, now).unwrap().endpoints, [1, 2].map(endpoint));
}

#[test]
fn ejected_endpoint_is_picked_if_no_other_is_left() {
    let (picker, now) = (picker(2), Instant::now());
    picker.endpoints().failed(endpoint(1), now);
    assert_eq!(picker.pick(&PromptHash::none(), Some(&[endpoint(1)]), now).unwrap().endpoints, [endpoint(1)]);
}

#[test]
fn draining_or_removed_endpoint_is_not_picked() {
    let (picker, now) = (picker(2), Instant::now());
    let hash = hash(&prompt(b'a', 4));
    assert_eq!(best(&picker, &hash, now), endpoint(1));
    let draining = config::ListedEndpoint { draining: true, ..endpoint(1).into() };
    picker.endpoints().replace(EndpointSource::Config, vec![draining.clone(), endpoint(3).into()]);
    assert_eq!(picker.pick(&hash, None, now).unwrap().endpoints, [endpoint(3)]);
    picker.endpoints().replace(EndpointSource::Config, vec![draining]);
    assert_eq!(picker.pick(&hash, None, now), Err(NoEndpoint::NoneEligible));
    picker.endpoints().replace(EndpointSource::Config, vec![]);
    assert_eq!(picker.pick(&hash, None, now), Err(NoEndpoint::NoneEligible));
}

#[test]
fn pick_stays_in_the_subset() {
    let (picker, now) = (picker(3), Instant::now());
    let pick = |subset: &[SocketAddr]| picker.pick(&PromptHash::none(), Some(subset), now).map(|pick| pick.endpoints);
    for _ in 0..4 {
        assert_eq!(pick(&[endpoint(2), endpoint(9)]), Ok(vec![endpoint(2)]));
    }
    assert_eq!(pick(&[]), Err(NoEndpoint::NoneEligible));
    assert_eq!(pick(&[endpoint(9)]), Err(NoEndpoint::NoneEligible));
}

#[test]
fn limit_overrides_affinity() {
    let (picker, now) = (picker(2).with_max_in_flight(1), Instant::now());
    let hash = hash(&prompt(b'a', 4));
    let (first, _one) = picker.pick_and_begin(&hash, None, now).unwrap();
    let (second, two) = picker.pick_and_begin(&hash, None, now).unwrap();
    assert_eq!((first.endpoints[0], second.endpoints), (endpoint(1), vec![endpoint(2)]));
    assert_eq!(picker.pick(&hash, None, now), Err(NoEndpoint::Saturated));
    drop(two);
    assert_eq!(best(&picker, &hash, now), endpoint(2));
}

#[test]
fn prompt_hash_is_independent_of_chunking() {
    let body: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let whole = hash(&body);
    assert_eq!(whole.blocks.len(), prompt::MAX_BLOCKS);
    for size in [1, 7, 255, 256, 257, 62_000] {
        let mut hasher = PromptHasher::new();
        body.chunks(size).for_each(|chunk| hasher.update(chunk));
        assert_eq!(hasher.finish(), whole, "in pieces of {size}");
    }
    assert_eq!(hash(&body[..prompt::BLOCK * 3 + 17]).blocks, whole.blocks[..3]);
    assert_eq!(hash(&body[..prompt::BLOCK - 1]), PromptHash::none());
}

#[test]
fn prefix_table_has_a_fixed_capacity() {
    let mut affinity = Affinity::new();
    for n in 0..2 * CAPACITY as u64 {
        affinity.learn(&blocks(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)), 0);
    }
    assert_eq!(affinity.len(), CAPACITY);
    let newest = blocks((2 * CAPACITY as u64 - 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    assert_eq!(affinity.longest(&newest, |_| true), Some(0));
    let oldest = blocks(0);
    assert_eq!(affinity.longest(&oldest, |_| true), None);
}

#[test]
fn limit_holds_across_workers() {
    let (picker, now) = (picker(3).with_max_in_flight(10), Instant::now());
    let admitted: usize = std::thread::scope(|scope| {
        let worker =
            || (0..20).map_while(|_| picker.pick_and_begin(&PromptHash::none(), None, now).ok()).collect::<Vec<_>>();
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
        let guards: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        guards.iter().map(Vec::len).sum()
    });
    assert_eq!(admitted, 30);
}

fn of_session(number: usize) -> PromptHash {
    PromptHash::none().with_session(Some(SessionHash::new(format!("session-{number}").as_bytes())))
}

fn in_order(picker: &BuiltinPicker, session: usize, now: Instant) -> Vec<SocketAddr> {
    picker.pick(&of_session(session), None, now).unwrap().endpoints
}

#[test]
fn session_maps_to_the_same_endpoints_on_every_agent() {
    let (one, now) = (picker(5), Instant::now());
    let other = BuiltinPicker::new(Arc::new(EndpointSet::of((1..=5).rev().map(endpoint), Ejection::default())));
    for session in 0..50 {
        let order = in_order(&one, session, now);
        assert_eq!(order.len(), 5);
        for prompt in [hash(&prompt(b'a', 3)), hash(&prompt(session as u8, 3)), PromptHash::none()] {
            let asked = prompt.with_session(Some(SessionHash::new(format!("session-{session}").as_bytes())));
            for picker in [&one, &other] {
                assert_eq!(picker.pick(&asked, None, now).unwrap().endpoints, order, "{session}");
            }
        }
    }
}

#[test]
fn sessions_are_spread_evenly() {
    let (picker, now) = (picker(5), Instant::now());
    let mut sessions = BTreeMap::new();
    for session in 0..5000 {
        *sessions.entry(in_order(&picker, session, now)[0]).or_insert(0) += 1;
    }
    assert!(sessions.len() == 5 && sessions.values().all(|count| (850..1150).contains(count)), "{sessions:?}");
}

#[test]
fn session_moves_only_beyond_the_slack() {
    let (picker, now) = (picker(3), Instant::now());
    let order = in_order(&picker, 7, now);
    let mut busy: Vec<_> = (0..SESSION_SLACK).map(|_| picker.endpoints().begin(order[0], now)).collect();
    assert_eq!(in_order(&picker, 7, now), order, "within the slack");
    busy.push(picker.endpoints().begin(order[0], now));
    assert_eq!(in_order(&picker, 7, now), [order[1], order[2], order[0]], "beyond the slack");
    drop(busy);
    assert_eq!(in_order(&picker, 7, now), order);
}

#[test]
fn sessions_return_to_an_endpoint_that_recovers() {
    let (picker, now) = (picker(3), Instant::now());
    let order = in_order(&picker, 7, now);
    picker.endpoints().failed(order[0], now);
    assert_eq!(in_order(&picker, 7, now), [order[1], order[2], order[0]]);
    picker.endpoints().succeeded(order[0], Instant::now());
    assert_eq!(in_order(&picker, 7, now), order);
    let listed = |drains: bool| {
        let draining =
            |address: SocketAddr| config::ListedEndpoint { draining: drains && address == order[0], ..address.into() };
        (1..=3).map(endpoint).map(draining).collect()
    };
    picker.endpoints().replace(EndpointSource::Config, listed(true));
    assert_eq!(in_order(&picker, 7, now), order[1..]);
    picker.endpoints().replace(EndpointSource::Config, listed(false));
    assert_eq!(in_order(&picker, 7, now), order);
}

proptest! {
    /// If one endpoint is removed, its sessions move to their second choice and all others stay.
    #[test]
    fn removed_endpoint_moves_only_its_own_sessions(all in 2..20u8, gone in any::<prop::sample::Index>()) {
        let (before, now) = (picker(all), Instant::now());
        let gone = endpoint(1 + gone.index(all.into()) as u8);
        let left = (1..=all).map(endpoint).filter(|&endpoint| endpoint != gone);
        let after = BuiltinPicker::new(Arc::new(EndpointSet::of(left, Ejection::default())));
        for session in 0..100 {
            let order = in_order(&before, session, now);
            let stays = if order[0] == gone { order[1] } else { order[0] };
            prop_assert_eq!(in_order(&after, session, now)[0], stays);
        }
    }
}
