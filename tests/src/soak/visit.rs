//! One request of a soak run and its expected response, determined by a seed.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::ledger::Wrong;
use crate::content::{Alphabet, Fnv};
use crate::model_server::{Framing, Lengths, Pauses, Plan};
use crate::{BodyEnd, ModelServer, Random, Request, Response};

/// Longest lifetime of a client that is killed.
const SHORT_LIFE: u64 = 40;

/// The pools of the agent's configuration; the path prefix selects one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    Stable,
    Epp,
    Lease,
    Mortal,
    Linked,
}

impl Pool {
    const ALL: [Self; 5] = [Self::Stable, Self::Epp, Self::Lease, Self::Mortal, Self::Linked];

    fn prefix(self) -> &'static str {
        match self {
            Self::Stable => "/stable",
            Self::Epp => "/epp",
            Self::Lease => "/lease",
            Self::Mortal => "/mortal",
            Self::Linked => "/linked",
        }
    }
}

#[derive(Debug)]
pub(super) struct Visit {
    pub(super) pool: Pool,
    name: String,
    plan: Plan,
    /// Size of the text in the request's JSON body, in bytes.
    upload: Option<u64>,
    /// When the client is killed.
    pub(super) leaves_after: Option<Duration>,
}

impl Visit {
    pub(super) fn choose(random: &mut Random, name: String) -> Self {
        let stream_id = random.below(u64::MAX);
        let whole = Plan { stream_id, ..Plan::default() };
        let (plan, upload) = match random.below(8) {
            // An event stream at a token's pace.
            0..=2 => {
                let pauses = Pauses { seed: stream_id, every: 1, up_to_us: 4000 };
                let headers = vec![("content-type".to_owned(), "text/event-stream".to_owned())];
                let size = 2000 + random.below(20_000);
                let (chunks, writes) = (Lengths::Fixed(120), Lengths::Fixed(130));
                let framing = Framing::Chunked;
                (Plan { framing, headers, size, chunks, writes, pauses: Some(pauses), ..whole }, None)
            }
            3 | 4 => (Plan { size: random.below(4000), ..whole }, None),
            5 => (Plan { size: 100_000 + random.below(900_000), ..whole }, None),
            _ => {
                let most = random.pick(&[2000, 60_000, 2_000_000]);
                (Plan { size: 500, ..whole }, Some(1 + random.below(most)))
            }
        };
        let leaves_after = random.one_in(12).then(|| Duration::from_millis(random.below(SHORT_LIFE)));
        Self { pool: random.pick(&Pool::ALL), name, plan, upload, leaves_after }
    }

    pub(super) fn request(&self) -> Request {
        let mut request = self.plan.request().header("x-request-id", self.name.clone());
        request.target = format!("{}/body", self.pool.prefix());
        if let Some(body) = self.body() {
            request.method = "POST".to_owned();
            request = request.header("content-type", "application/json").body(body);
        }
        request
    }

    fn body(&self) -> Option<Vec<u8>> {
        let text = Alphabet::Text.bytes(self.plan.stream_id, 0, self.upload? as usize);
        Some([br#"{"model":"soak","prompt":""#, &text[..], br#""}"#].concat())
    }

    /// Checks every byte of the response, and of the request if it went to one of `servers`.
    pub(super) fn check(&self, response: &Response, servers: &[ModelServer]) -> Result<()> {
        if response.status() != 200 {
            bail!("status {}: {}", response.status(), response.text().chars().take(300).collect::<String>());
        }
        self.plan.checker().feed(&response.body)?;
        let whole = response.body.len() as u64 == self.plan.size;
        ensure!(response.read.end == BodyEnd::Complete, "{:?} after {} bytes", response.read.end, response.body.len());
        ensure!(whole, Wrong(format!("orderly close after {} bytes of {}", response.body.len(), self.plan.size)));
        let Some(body) = self.body() else { return Ok(()) };
        let (length, hash) = (body.len() as u64, Fnv::of(&body).value());
        for sent in servers.iter().filter_map(|server| server.sent(&self.name)) {
            let same = (sent.request_length, sent.request_hash) == (length, hash);
            ensure!(
                same,
                Wrong(format!("{} bytes of a request of {length} arrived, or they differ", sent.request_length))
            );
        }
        Ok(())
    }
}
