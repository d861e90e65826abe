//! How a client reads a body; every byte is compared with the expected one.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::sleep;

use crate::client::{BodyRead, Pace, Piece};
use crate::{BodyEnd, Checker, Client};

#[derive(Clone, Copy, Debug)]
pub enum Reader {
    Fast,
    /// At most `bytes` every `tick`.
    Slow {
        bytes: usize,
        tick: Duration,
    },
    /// Pauses once it has this many bytes, then reads fast.
    Stalled {
        after: u64,
        pause: Duration,
    },
}

impl Reader {
    /// Reads the body to its end, after its head was read. An error locates the first byte that differs from `checker`'s.
    pub async fn take(self, client: &mut Client, checker: &mut Checker) -> Result<BodyRead> {
        let pace = match self {
            Self::Fast => Pace::Fast,
            Self::Slow { bytes, tick } => Pace::Slow { bytes, tick },
            Self::Stalled { after, pause } => {
                if at_least(client, checker, after).await?.is_none() {
                    sleep(pause).await;
                }
                Pace::Fast
            }
        };
        let mut read = client.read_body(pace, |bytes| Ok(checker.feed(bytes)?)).await?;
        read.len = checker.offset();
        Ok(read)
    }
}

/// Reads until `bytes` of the body have arrived; returns the body's end if that comes first.
pub async fn at_least(client: &mut Client, checker: &mut Checker, bytes: u64) -> Result<Option<BodyEnd>> {
    while checker.offset() < bytes {
        match client.piece(64 << 10).await.with_context(|| format!("after {} bytes", checker.offset()))? {
            Piece::Data(data) => checker.feed(&data)?,
            Piece::End(end) => return Ok(Some(end)),
        }
    }
    Ok(None)
}
