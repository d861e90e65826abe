//! A client's next request and how it reads the response, determined by a seed; no sockets involved.

use std::time::Duration;

use crate::model_server::{After, Fault, FaultKind, Framing, HeadWrites, Lengths, Pauses, Plan, Upgraded};
use crate::{Random, Reader};

const KIB: u64 = 1 << 10;
/// Maximum size of a response, and of each direction after a protocol switch.
const LARGEST: u64 = 3_000_000;
const LARGEST_REQUEST: u64 = 300_000;

#[derive(Clone, Debug)]
pub struct Case {
    /// Uses a new connection although one is kept.
    pub fresh: bool,
    /// `SO_RCVBUF` of a new connection.
    pub rcvbuf: Option<usize>,
    pub exchange: Exchange,
}

#[derive(Clone, Debug)]
pub enum Exchange {
    Response {
        plan: Plan,
        head_only: bool,
        body: Option<RequestBody>,
        /// The request asks for a stream.
        streamed: bool,
        taking: Taking,
    },
    /// The connection switches protocols: bytes in both directions.
    Switch { plan: Plan, upload: Upload, taking: Taking },
}

#[derive(Clone, Copy, Debug)]
pub enum Taking {
    All(Reader),
    /// The client leaves after this many bytes.
    Part {
        bytes: u64,
        reset: bool,
    },
}

#[derive(Clone, Copy, Debug)]
pub struct RequestBody {
    pub stream_id: u64,
    pub size: u64,
    /// Bytes per chunk; with `content-length` if absent.
    pub chunks: Option<usize>,
    /// Bytes per write, each followed by a pause.
    pub pieces: Option<usize>,
}

/// What a client sends after a switch before it closes.
#[derive(Clone, Copy, Debug)]
pub struct Upload {
    pub stream_id: u64,
    pub size: u64,
    pub writes: Lengths,
    pub pauses: Option<Pauses>,
}

impl Exchange {
    /// Whether the endpoint closes its connection afterwards without announcing it.
    pub fn closes(&self) -> bool {
        matches!(self, Self::Response { plan, .. } if plan.after == After::SilentClose)
    }
}

impl Case {
    pub fn choose(random: &mut Random) -> Self {
        let exchange = if random.one_in(8) { switch(random) } else { response(random) };
        Self {
            fresh: random.one_in(6),
            rcvbuf: random.pick(&[None, Some(2048), Some(16 << 10), Some(256 << 10)]),
            exchange,
        }
    }
}

pub(super) fn response(random: &mut Random) -> Exchange {
    let framing = random.pick(&[Framing::ContentLength, Framing::Chunked, Framing::UntilClose]);
    let chunked = framing == Framing::Chunked;
    let mut plan = stream(random);
    let (size, seed) = (plan.size, plan.stream_id);
    plan.framing = framing;
    plan.chunks = match random.below(6) {
        0 => Lengths::Fixed(64 << 10),
        1 if size < 5000 => Lengths::OneByte,
        _ => Lengths::Random { seed, max: 1 + size / 10 },
    };
    plan.chunk_extension = (chunked && random.one_in(2)).then(|| "a=b".to_owned());
    if chunked && random.one_in(2) {
        plan.trailers = vec![("x-t".to_owned(), "v".to_owned())];
    }
    if random.one_in(3) {
        plan.headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
    }
    plan.cork = framing == Framing::UntilClose && random.one_in(2);
    // An unannounced close right after the last byte makes a complete message look broken.
    plan.after = random.pick(&[After::KeepAlive, After::KeepAlive, After::KeepAlive, After::Close, After::SilentClose]);
    let head_only = framing != Framing::UntilClose && random.one_in(20);
    plan.fault = plan.fault.filter(|_| !head_only);
    let body = random.one_in(6).then(|| RequestBody {
        stream_id: random.below(u64::MAX),
        size: at_random(random, LARGEST_REQUEST),
        chunks: random.one_in(2).then(|| 1 + random.below(50_000) as usize),
        pieces: random.one_in(3).then_some(20_000),
    });
    let taking = if head_only { Taking::All(Reader::Fast) } else { taking(random, size) };
    Exchange::Response { plan, head_only, body, streamed: false, taking }
}

fn switch(random: &mut Random) -> Exchange {
    let upgraded = random.pick(&[Upgraded::Echo, Upgraded::Send, Upgraded::SendLast]);
    let of = stream(random);
    let Plan { stream_id: seed, size, writes, pauses, .. } = stream(random);
    let upload = Upload { stream_id: seed, size, writes, pauses };
    let fault = of.fault.filter(|_| upgraded != Upgraded::Echo);
    let taking = taking(random, if upgraded == Upgraded::Echo { size } else { of.size });
    let switching = Plan::switching("websocket", upgraded);
    let plan = Plan { upload: Some(seed), status: 101, headers: switching.headers, ..of };
    Exchange::Switch { plan: Plan { fault, framing: Framing::None, upgraded: Some(upgraded), ..plan }, upload, taking }
}

/// The length of a stream, and its writes, pauses and faults.
fn stream(random: &mut Random) -> Plan {
    let (size, seed) = (at_random(random, LARGEST), random.below(u64::MAX));
    let pauses = |every, up_to_us| Some(Pauses { seed, every, up_to_us });
    let now_and_then = pauses(if size > 100_000 { 8 } else { 2 }, 1500).filter(|_| random.one_in(2));
    let (writes, pauses) = match random.below(8) {
        0 if size < 5000 => (Lengths::OneByte, now_and_then),
        0 | 1 => (Lengths::Fixed(64 << 10), now_and_then),
        2 => (Lengths::Random { seed, max: 1000.max(size / 50) }, now_and_then),
        3 => (Lengths::Random { seed, max: 100_000 }, now_and_then),
        // As fast as clients read, so that all of it is steered.
        4 | 5 => (Lengths::Random { seed, max: 30_000 }, pauses(1, 1000)),
        // At a token's pace.
        _ => (Lengths::Random { seed, max: 100.max(size / 200) }, pauses(1, 500)),
    };
    let fault = (size > 0 && random.one_in(4)).then(|| {
        let kinds = [FaultKind::Reset, FaultKind::Close, FaultKind::StallMs(1 + random.below(150))];
        Fault { after: random.below(size), kind: random.pick(&kinds) }
    });
    Plan {
        size,
        stream_id: seed,
        head: HeadWrites {
            split_at: random.one_in(8).then(|| random.below(80) as usize),
            pause_us: random.below(500),
            with_body: random.one_in(2),
        },
        writes,
        pauses,
        fault,
        ..Plan::default()
    }
}

/// Nothing, a byte, a page or all of it: each order of magnitude is equally likely.
fn at_random(random: &mut Random, largest: u64) -> u64 {
    let most = random.pick(&[1, 1000, 100_000, largest]);
    random.below(most.min(largest) + 1)
}

fn taking(random: &mut Random, size: u64) -> Taking {
    if random.one_in(8) {
        return Taking::Part { bytes: random.below(size + 1), reset: random.one_in(2) };
    }
    Taking::All(match random.below(4) {
        0 => {
            // At most half a second.
            let bytes = 1 + size / 250 + random.below(100 * KIB);
            Reader::Slow { bytes: bytes as usize, tick: Duration::from_millis(1) }
        }
        1 => Reader::Stalled { after: random.below(size + 1), pause: Duration::from_millis(random.below(100)) },
        _ => Reader::Fast,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases(seed: u64, count: usize) -> Vec<Case> {
        let mut random = Random::new(seed);
        (0..count).map(|_| Case::choose(&mut random)).collect()
    }

    #[test]
    fn seed_alone_determines_case() {
        assert_eq!(format!("{:?}", cases(7, 200)), format!("{:?}", cases(7, 200)));
        assert_ne!(format!("{:?}", cases(7, 20)), format!("{:?}", cases(8, 20)));
    }

    #[test]
    fn random_cases_cover_every_feature() {
        let cases = cases(1, 5000);
        let plans = || {
            cases.iter().map(|case| match &case.exchange {
                Exchange::Response { plan, .. } | Exchange::Switch { plan, .. } => plan,
            })
        };
        for framing in [Framing::ContentLength, Framing::Chunked, Framing::UntilClose, Framing::None] {
            assert!(plans().any(|plan| plan.framing == framing), "{framing:?}");
        }
        for kind in [FaultKind::Reset, FaultKind::Close] {
            assert!(plans().any(|plan| plan.fault.is_some_and(|fault| fault.kind == kind)), "{kind:?}");
        }
        for upgraded in [Upgraded::Echo, Upgraded::Send, Upgraded::SendLast] {
            assert!(plans().any(|plan| plan.upgraded == Some(upgraded)), "{upgraded:?}");
        }
        for after in [After::KeepAlive, After::Close, After::SilentClose] {
            assert!(plans().any(|plan| plan.after == after), "{after:?}");
        }
        assert!(plans().any(|plan| plan.size == 0) && plans().any(|plan| plan.size > LARGEST * 9 / 10));
        let takings = || {
            cases.iter().map(|case| match &case.exchange {
                Exchange::Response { taking, .. } | Exchange::Switch { taking, .. } => taking,
            })
        };
        assert!(takings().any(|taking| matches!(taking, Taking::All(Reader::Slow { .. }))));
        assert!(takings().any(|taking| matches!(taking, Taking::All(Reader::Stalled { .. }))));
        assert!(takings().any(|taking| matches!(taking, Taking::Part { reset: true, .. })));
        assert!(cases.iter().any(|case| case.rcvbuf == Some(2048)) && cases.iter().any(|case| case.fresh));
    }
}
