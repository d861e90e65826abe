//! What the networks and machines of a round are like, determined by a seed.

use std::time::Duration;

use crate::{
    Random,
    cable::{Faults, Renumbering},
};

/// The places: client, agent, endpoint.
pub(super) const PLACES: usize = 3;
pub(super) const CLIENT: usize = 0;
const AGENT: usize = 1;
pub(super) const ENDPOINT: usize = 2;

/// Every scale that TCP knows (RFC 7323 §2.3).
const SCALES: u64 = 15;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Conditions {
    pub(super) ipv6: bool,
    pub(super) tcp: [TcpSettings; PLACES],
    /// MTUs of the cables: the client's, and the endpoint's.
    pub(super) mtus: [u32; 2],
    pub(super) offloads: [bool; 2],
    pub(super) faults: [Faults; 2],
    /// Agents are killed and replaced.
    pub(super) kills: bool,
}

/// Settings of TCP in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcpSettings {
    pub(super) timestamps: bool,
    pub(super) sack: bool,
    pub(super) ecn: bool,
    /// The window scale; `None`: not used.
    pub(super) scale: Option<u32>,
}

impl TcpSettings {
    /// The settings below `/proc/sys/net/ipv4`.
    pub(super) fn sysctls(&self) -> Vec<(&'static str, String)> {
        let flag = |is: bool| u8::from(is).to_string();
        let mut all = vec![
            ("tcp_timestamps", flag(self.timestamps)),
            ("tcp_sack", flag(self.sack)),
            // 2: only if the peer asks for it, as by default.
            ("tcp_ecn", (2 - u8::from(self.ecn)).to_string()),
            ("tcp_window_scaling", flag(self.scale.is_some())),
        ];
        // The scale is the one that the largest buffer needs.
        all.extend(self.scale.map(|scale| ("tcp_rmem", format!("4096 131072 {}", 1u32 << (15 + scale)))));
        all
    }

    /// The largest window on a route, which bounds the scale where the machine's limit for buffers asks for a larger one.
    pub(super) fn window(&self) -> Option<u32> {
        self.scale.filter(|scale| *scale < 8).map(|scale| (1 << (15 + scale)) + 20_000)
    }
}

impl Conditions {
    pub(super) fn choose(random: &mut Random) -> Self {
        let ipv6 = random.one_in(2);
        // Where the two connections differ, the path is not used.
        let each = |random: &mut Random, yes: bool| -> [bool; PLACES] {
            let mut all = [yes; PLACES];
            if random.one_in(10) {
                all[random.pick(&[CLIENT, ENDPOINT])] = !yes;
            }
            all
        };
        let timestamps = !random.one_in(3);
        let timestamps = each(random, timestamps);
        let sack = !random.one_in(3);
        let sack = each(random, sack);
        let ecn = random.one_in(4);
        let ecn = each(random, ecn);
        let tcp = std::array::from_fn(|place| TcpSettings {
            timestamps: timestamps[place],
            sack: sack[place],
            ecn: ecn[place],
            scale: (!random.one_in(8)).then(|| random.below(SCALES) as u32),
        });
        Self {
            ipv6,
            tcp,
            mtus: mtus(random, ipv6),
            offloads: [random.one_in(2), random.one_in(2)],
            faults: [faults(random), faults(random)],
            kills: random.one_in(2),
        }
    }

    /// Whether streams can take the path at all.
    pub(super) fn fits(&self) -> bool {
        let [client, agent, endpoint] = &self.tcp;
        let both = |setting: fn(&TcpSettings) -> bool| {
            (setting(client) && setting(agent)) == (setting(endpoint) && setting(agent))
        };
        // The agent accepts ECN from clients that ask for it, and endpoints accept it from the agent.
        let ecn = client.ecn == self.tcp[AGENT].ecn;
        both(|tcp| tcp.timestamps) && both(|tcp| tcp.sack) && ecn && self.mtus[0] >= self.mtus[1]
    }
}

fn mtus(random: &mut Random, ipv6: bool) -> [u32; 2] {
    let of_ipv4 = [300, 576, 1000, 1400, 1500, 1500, 1500, 9000];
    let of_ipv6 = [1280, 1300, 1400, 1500, 1500, 1500, 9000];
    let one = |random: &mut Random| random.pick(if ipv6 { &of_ipv6[..] } else { &of_ipv4[..] });
    let (a, b) = (one(random), one(random));
    // Segments that are too large for the client keep a response off the path.
    if random.one_in(8) { [a, b] } else { [a.max(b), a.min(b)] }
}

fn faults(random: &mut Random) -> Faults {
    let per_mille = |random: &mut Random, most| if random.one_in(2) { random.below(most) } else { 0 };
    Faults {
        lost: per_mille(random, 30),
        twice: per_mille(random, 30),
        late: per_mille(random, 50),
        delay: Duration::from_micros(random.pick(&[0, 100, 1000, 5000])),
        jitter: Duration::from_micros(random.pick(&[1, 100, 2000])),
        lateness: Duration::from_micros(random.pick(&[100, 2000, 20_000])),
        numbers: Renumbering { sequences: !random.one_in(3), clocks: !random.one_in(3) },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn many() -> Vec<Conditions> {
        let mut random = Random::new(9);
        (0..2000).map(|_| Conditions::choose(&mut random)).collect()
    }

    #[test]
    fn random_conditions_cover_every_feature() {
        let all = many();
        for place in 0..PLACES {
            let scales: BTreeSet<_> = all.iter().map(|one| one.tcp[place].scale).collect();
            assert_eq!(scales.len(), SCALES as usize + 1, "{scales:?}");
            let settings: [fn(&TcpSettings) -> bool; 3] = [|tcp| tcp.timestamps, |tcp| tcp.sack, |tcp| tcp.ecn];
            for setting in settings {
                assert!([true, false].iter().all(|yes| all.iter().any(|one| setting(&one.tcp[place]) == *yes)));
            }
        }
        let features: [fn(&Conditions) -> bool; 4] =
            [|one| one.ipv6, |one| one.kills, |one| one.offloads[0], Conditions::fits];
        for one in features {
            let count = all.iter().filter(|conditions| one(conditions)).count();
            assert!((200..1800).contains(&count), "{count}");
        }
        let faults = || all.iter().flat_map(|one| one.faults);
        assert!(faults().any(|faults| faults.lost > 0 && faults.twice > 0 && faults.late > 0));
        assert!(faults().any(|faults| faults.numbers.sequences) && faults().any(|faults| faults.numbers.clocks));
        assert!(all.iter().any(|one| one.mtus[0] < one.mtus[1]) && all.iter().any(|one| one.mtus[1] < 500));
    }

    #[test]
    fn seed_alone_determines_conditions() {
        assert_eq!(many(), many());
    }
}
