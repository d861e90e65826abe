//! Deterministic: time is an argument, and rotation starts at the first endpoint.

use std::{collections::BTreeMap, time::Duration};

use super::{affinity::CAPACITY, *};

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8000))
}

fn picker(endpoints: u8) -> BuiltinPicker {
    BuiltinPicker::new((1..=endpoints).map(endpoint).collect())
}

fn hash(body: &[u8]) -> PromptHash {
    let mut hasher = PromptHasher::new();
    hasher.update(body);
    hasher.finish()
}

/// `blocks` blocks of `letter`.
fn prompt(letter: u8, blocks: usize) -> Vec<u8> {
    vec![letter; blocks * prompt::BLOCK]
}

fn best(picker: &BuiltinPicker, prompt: &PromptHash, now: Instant) -> SocketAddr {
    picker.pick(prompt, None, now).unwrap().endpoints[0]
}

#[test]
fn spreads_evenly_without_load() {
    let (picker, now) = (picker(3), Instant::now());
    let mut picked = BTreeMap::new();
    for _ in 0..30 {
        *picked.entry(best(&picker, &PromptHash::none(), now)).or_insert(0) += 1;
    }
    assert_eq!(picked, (1..=3).map(|n| (endpoint(n), 10)).collect());
}

#[test]
fn spreads_evenly_under_load() {
    let (picker, now) = (picker(3), Instant::now());
    let guards: Vec<_> = (0..30).map(|_| picker.pick_and_begin(&PromptHash::none(), None, now).unwrap().1).collect();
    for n in 1..=3 {
        assert_eq!(picker.in_flight(endpoint(n)), 10);
    }
    drop(guards);
    assert_eq!(picker.in_flight(endpoint(1)), 0);
}

#[test]
fn least_in_flight_first_then_the_fallbacks() {
    let (picker, now) = (picker(4), Instant::now());
    let _busy =
        [picker.begin(endpoint(1)), picker.begin(endpoint(1)), picker.begin(endpoint(2)), picker.begin(endpoint(4))];
    let pick = picker.pick(&PromptHash::none(), None, now).unwrap();
    assert_eq!(pick.endpoints, [endpoint(3), endpoint(2), endpoint(4)]);
}

#[test]
fn a_conversation_stays_where_its_prefix_is() {
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
fn the_longest_known_prefix_wins() {
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
    let mut busy: Vec<_> = (0..AFFINITY_SLACK).map(|_| picker.begin(endpoint(1))).collect();
    assert_eq!(best(&picker, &hash, now), endpoint(1), "within the slack");
    busy.push(picker.begin(endpoint(1)));
    assert_eq!(best(&picker, &hash, now), endpoint(2), "beyond it");
    drop(busy);
    assert_eq!(best(&picker, &hash, now), endpoint(2), "which now knows the prefix");
}

#[test]
fn a_failed_endpoint_is_avoided_for_a_second_then_two_up_to_thirty() {
    let (picker, mut now) = (picker(2), Instant::now());
    for seconds in [1, 2, 4, 8, 16, 30, 30] {
        picker.report_failure(endpoint(1), now);
        picker.report_failure(endpoint(1), now);
        let last = now + Duration::from_secs(seconds) - Duration::from_nanos(1);
        for now in [now, last] {
            assert_eq!(picker.pick(&PromptHash::none(), None, now).unwrap().endpoints, [endpoint(2)]);
        }
        now += Duration::from_secs(seconds);
        assert_eq!(picker.pick(&PromptHash::none(), None, now).unwrap().endpoints.len(), 2);
    }
    picker.report_failure(endpoint(1), now);
    picker.report_success(endpoint(1));
    assert_eq!(picker.pick(&PromptHash::none(), None, now).unwrap().endpoints.len(), 2);
    picker.report_failure(endpoint(1), now);
    let after = now + ejection::FIRST;
    assert_eq!(
        picker.pick(&PromptHash::none(), None, after).unwrap().endpoints.len(),
        2,
        "success resets the doubling"
    );
}

#[test]
fn affinity_does_not_hold_to_an_ejected_endpoint() {
    let (picker, now) = (picker(2), Instant::now());
    let hash = hash(&prompt(b'a', 4));
    assert_eq!(best(&picker, &hash, now), endpoint(1));
    picker.report_failure(endpoint(1), now);
    assert_eq!(best(&picker, &hash, now), endpoint(2));
}

#[test]
fn with_all_ejected_all_are_eligible() {
    let (picker, now) = (picker(2), Instant::now());
    picker.report_failure(endpoint(1), now);
    picker.report_failure(endpoint(2), now);
    assert_eq!(picker.pick(&PromptHash::none(), None, now).unwrap().endpoints.len(), 2);
    assert_eq!(picker.pick(&PromptHash::none(), Some(&[endpoint(1)]), now).unwrap().endpoints, [endpoint(1)]);
}

#[test]
fn a_subset_is_kept_to() {
    let (picker, now) = (picker(3), Instant::now());
    let pick = |subset: &[SocketAddr]| picker.pick(&PromptHash::none(), Some(subset), now).map(|pick| pick.endpoints);
    for _ in 0..4 {
        assert_eq!(pick(&[endpoint(2), endpoint(9)]), Ok(vec![endpoint(2)]));
    }
    assert_eq!(pick(&[]), Err(NoEndpoint::NoneEligible));
    assert_eq!(pick(&[endpoint(9)]), Err(NoEndpoint::NoneEligible));
    assert_eq!(
        super::BuiltinPicker::new(Vec::new()).pick(&PromptHash::none(), None, now),
        Err(NoEndpoint::NoneEligible)
    );
}

#[test]
fn the_limit_holds_also_against_affinity() {
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
fn unknown_endpoints_are_not_counted_and_repeated_ones_are_one() {
    let picker = BuiltinPicker::new(vec![endpoint(1), endpoint(1)]);
    assert_eq!(picker.endpoints(), [endpoint(1)]);
    let _unknown = picker.begin(endpoint(9));
    picker.report_failure(endpoint(9), Instant::now());
    picker.report_success(endpoint(9));
    assert_eq!(picker.in_flight(endpoint(9)), 0);
}

#[test]
fn a_prompt_hash_does_not_depend_on_how_the_body_is_cut() {
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
fn the_table_of_prefixes_does_not_grow() {
    let mut affinity = Affinity::new();
    for n in 0..2 * CAPACITY as u64 {
        affinity.learn(&PromptHash { blocks: vec![n.wrapping_mul(0x9e37_79b9_7f4a_7c15)] }, 0);
    }
    assert_eq!(affinity.len(), CAPACITY);
    let newest = PromptHash { blocks: vec![(2 * CAPACITY as u64 - 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)] };
    assert_eq!(affinity.longest(&newest, |_| true), Some(0));
    let oldest = PromptHash { blocks: vec![0] };
    assert_eq!(affinity.longest(&oldest, |_| true), None);
}

#[test]
fn workers_share_it() {
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
