//! The last bytes of a stream, which are kept in the flow's ring.

use penstock_common::{
    tail::{self, RING, TAIL},
    wire::flow::ENDPOINT,
};
use proptest::prelude::*;

use crate::scene::{NUMBERS, Numbers, Scene, byte};

/// The last bytes that are kept, compared with the stream.
fn kept(scene: &Scene) -> u32 {
    let leg = &scene.flow.legs[ENDPOINT];
    let (end, kept) = (leg.highest.get() as u32, leg.kept());
    let (older, newer) = tail::last(&scene.kernel.ring, end, kept);
    let bytes = [older, newer].concat();
    let expected: Vec<u8> = (0..kept).map(|at| byte(end.wrapping_sub(kept).wrapping_add(at))).collect();
    assert_eq!(bytes, expected, "the bytes before {end}");
    kept
}

#[test]
fn newer_bytes_of_another_cpu_are_not_taken_for_these() {
    let mut scene = Scene::begun(NUMBERS);
    scene.endpoint_sends(scene.data(10, 100));
    assert_eq!(kept(&scene), 110);
    // While this CPU writes bytes 110 to 210, another one writes bytes up to one or more rings later.
    let end = |at: u32| 1 << 32 | u64::from(NUMBERS.endpoint + at);
    scene.kernel.before_load = vec![Some(end(210 + RING + 500)), None];
    scene.endpoint_sends(scene.data(110, 100));
    scene.flow.legs[ENDPOINT].bytes.set(u64::from(210 + RING + 500));
    assert_eq!(scene.flow.legs[ENDPOINT].kept(), 500);
    // Exactly a ring later, the places are others.
    let mut scene = Scene::begun(NUMBERS);
    scene.kernel.before_load = vec![Some(end(10 + RING)), None];
    scene.endpoint_sends(scene.data(10, 100));
    assert_eq!(scene.flow.legs[ENDPOINT].torn.get(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Segments in any order, repeated and overlapping, of any size.
    #[test]
    fn last_bytes_are_kept(endpoint: u32, cuts in proptest::collection::vec(1u32..6000, 1..30), order: u64) {
        let mut scene = Scene::begun(Numbers { endpoint, ..NUMBERS });
        let mut segments = vec![(0, 10)];
        for len in cuts {
            let (at, before) = segments[segments.len() - 1];
            segments.push((at + before, len));
        }
        let all = segments.iter().map(|(_, len)| len).sum::<u32>();
        // Each one twice, the second time with the end of the one before.
        let again = segments.iter().map(|&(at, len)| (at.saturating_sub(700), len + at.min(700)));
        let mut sent: Vec<(u32, u32)> = segments.iter().copied().chain(again).collect();
        let mut random = order | 1;
        for last in (1..sent.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sent.swap(last, (random >> 33) as usize % (last + 1));
        }
        for (at, len) in sent {
            scene.endpoint_sends(scene.data(at, len));
        }
        prop_assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), u64::from(all));
        prop_assert_eq!(kept(&scene), all.min(TAIL));
    }
}
