//! What is measured: loads, and the proxies that take each of them.

use std::time::Duration;

use super::load::{Ask, Load, Streams};
use super::proxy::Kind;
use crate::chat::Chat;

pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// What `docs/performance.md` says about it.
    pub(super) explanation: &'static str,
    pub(super) work: Work,
    pub(super) kinds: &'static [Kind],
}

pub(super) enum Work {
    Requests(Load),
    Streams(Streams),
}

impl Work {
    /// What the proxy's CPU time is divided by.
    pub(super) fn unit(&self) -> &'static str {
        match self {
            Self::Requests(_) => "request",
            Self::Streams(_) => "token",
        }
    }
}

const KIB: usize = 1 << 10;
const CHAT: Chat = Chat { tokens: 100, interval: Duration::from_millis(20) };

pub(super) fn all() -> Vec<Scenario> {
    use Kind::{BuiltIn, Envoy, EnvoyBodies, Nginx, Penstock, PenstockUsage};
    let load = |ask, clients, connects| Work::Requests(Load { ask, clients, connects });
    vec![
        Scenario {
            name: "unary 1 KiB, c16",
            explanation: "POST with 1 KiB of text, which comes back; 16 clients, each on one connection",
            work: load(Ask::Text(KIB), 16, false),
            kinds: &[Penstock("auto"), PenstockUsage, Envoy, EnvoyBodies, BuiltIn("auto"), BuiltIn("off"), Nginx],
        },
        Scenario {
            name: "unary 1 KiB, c64",
            explanation: "the same with 64 clients",
            work: load(Ask::Text(KIB), 64, false),
            kinds: &[Penstock("auto"), Envoy, Nginx],
        },
        Scenario {
            name: "connection per request, c16",
            explanation: "the same with 16 clients, each request on a connection of its own",
            work: load(Ask::Text(KIB), 16, true),
            kinds: &[Penstock("auto"), Envoy, BuiltIn("auto"), Nginx],
        },
        Scenario {
            name: "256 KiB prompt, c8",
            explanation: "POST with 256 KiB of text, whose length and hash come back; 8 clients, each on one connection",
            work: load(Ask::Prompt(256 * KIB), 8, false),
            kinds: &[Penstock("auto"), Envoy, BuiltIn("auto"), Nginx],
        },
        Scenario {
            name: "200 streams, 50/s each",
            explanation: "200 event streams of 100 tokens, one each 20 ms; CPU time per token while all streams run and none \
                          begins, latencies up to the first event",
            work: Work::Streams(Streams { streams: 200, chat: CHAT, ramp: Duration::from_millis(400) }),
            kinds: &[Penstock("auto"), Penstock("off"), Envoy, Nginx],
        },
    ]
}
