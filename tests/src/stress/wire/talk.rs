//! Clients that do what path `wire` has rules for: they close their side early, send during their response, or leave before it begins.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::sleep;

use super::super::exchange::{Done, Outcome, Short, request};
use crate::{BodyEnd, Client, Plan, Random, client::Pace, model_server::Framing, reader::at_least};

/// Bytes that no agent forwards, because they are not a request.
const GARBAGE: &[u8] = b"\0nobody routes this\r\n\r\n";

#[derive(Clone, Copy, Debug)]
pub(super) enum Talk {
    /// Closes the sending side after so many bytes of the body.
    Finishes { after: u64 },
    /// Sends bytes after so many bytes of the body, then reads on, or leaves.
    Sends { after: u64, leaves: bool, reset: bool },
    /// Leaves so many microseconds after its request, or after a part of it.
    LeavesEarly { after_us: u64, whole: bool, reset: bool },
}

impl Talk {
    pub(super) fn choose(random: &mut Random, size: u64) -> Self {
        let (after, reset) = (random.below(size + 1), random.one_in(2));
        match random.below(3) {
            0 => Self::Finishes { after },
            1 => Self::Sends { after, leaves: random.one_in(2), reset },
            _ => Self::LeavesEarly { after_us: random.below(30_000), whole: !random.one_in(3), reset },
        }
    }
}

/// Requests the plan and talks. The response may be cut short, visibly; its bytes must be right.
pub(super) async fn run(mut client: Client, plan: &Plan, talk: Talk) -> Result<Done> {
    let request = request(plan, false, true, None);
    match talk {
        Talk::LeavesEarly { after_us, whole, reset } => {
            if whole {
                client.send(&request).await?;
            } else {
                client.send_raw(b"GET /test/body HTTP/1.1\r\nhost: x\r\nx-te").await?;
            }
            sleep(Duration::from_micros(after_us)).await;
            if reset {
                client.reset()?;
            }
            Ok(Done::new(Outcome::Left, 0))
        }
        Talk::Finishes { after } => {
            client.send(&request).await?;
            read(client, plan, after, async |client| client.finish().await).await
        }
        Talk::Sends { after, leaves, reset } => {
            client.send(&request).await?;
            if !leaves {
                return read(client, plan, after, async |client| client.send_raw(GARBAGE).await).await;
            }
            let mut checker = plan.checker();
            if client.head().await?.status == 200 {
                at_least(&mut client, &mut checker, after).await?;
                client.send_raw(GARBAGE).await?;
                if reset {
                    client.reset()?;
                }
            }
            Ok(Done::new(Outcome::Left, checker.offset()))
        }
    }
}

/// Reads the response and acts in the middle of it.
async fn read(
    mut client: Client,
    plan: &Plan,
    after: u64,
    act: impl AsyncFnOnce(&mut Client) -> Result<()>,
) -> Result<Done> {
    let mut checker = plan.checker();
    let head = client.head().await?;
    ensure!(head.status == 200, "status {}", head.status);
    let end = match at_least(&mut client, &mut checker, after).await? {
        Some(end) => end,
        None => {
            // The response may have been cut already.
            let _ = act(&mut client).await;
            client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await?.end
        }
    };
    let got = Short { bytes: checker.offset(), of: plan.size };
    // The endpoint closes when its client does, and its close ends such a body.
    let is_whole = got.bytes == got.of || plan.framing == Framing::UntilClose;
    ensure!(end != BodyEnd::Complete || is_whole, got);
    Ok(Done::new(Outcome::Left, checker.offset()))
}
