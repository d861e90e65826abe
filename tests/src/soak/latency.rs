//! The latency of a small request, repeated on one connection, and its change over time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::bounds::Drift;
use crate::{Client, Plan};

const EVERY: Duration = Duration::from_millis(50);
const SIZE: u64 = 1000;

/// In the order of measurement.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<Duration>);

impl Samples {
    /// The first and the last third.
    pub(super) fn drift(&self) -> Drift {
        let third = self.0.len() / 3;
        let sorted = |samples: &[Duration]| {
            let mut sorted = samples.to_vec();
            sorted.sort_unstable();
            sorted
        };
        Drift::new(&sorted(&self.0[..third]), &sorted(&self.0[self.0.len() - third..]))
    }
}

/// Measures until the deadline. Failed requests are skipped: the other clients report failures.
pub(super) async fn probe(agent: SocketAddr, until: Instant) -> Samples {
    let mut samples = Samples::default();
    let mut client = None;
    while Instant::now() < until {
        tokio::time::sleep(EVERY).await;
        match ask(client.take(), agent).await {
            Ok((took, kept)) => {
                samples.0.push(took);
                client = Some(kept);
            }
            Err(_) => client = None,
        }
    }
    samples
}

async fn ask(kept: Option<Client>, agent: SocketAddr) -> Result<(Duration, Client)> {
    let mut client = match kept {
        Some(client) => client,
        None => Client::connect(agent).await?,
    };
    let begin = Instant::now();
    let response = client.request(&Plan { size: SIZE, ..Plan::default() }.request()).await?;
    (response.status() == 200).then_some(()).context("status is not 200")?;
    Ok((begin.elapsed(), client))
}
