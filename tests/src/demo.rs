//! The scenario of `cargo xtask demo`: requests over real sockets and the real picker protocol, showing for each the endpoint that
//! answered, the path of the bytes, and whether they match what the endpoint sent.
//!
//! Only the path is the agent's own statement: bytes and hashes come from the model servers and the client, CPU time from `/proc`.

mod fleet;
mod load;
mod tour;

use std::pin::pin;

use anyhow::{Result, bail};

use fleet::Fleet;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Keep running until interrupted.
    pub keep: bool,
    /// If the kernel cannot steer, expect relaying.
    pub allow_relay: bool,
}

/// Returns whether every check passed; returns an error if `stopped` resolves first. Child processes end when this returns or is
/// dropped.
pub async fn run(options: Options, stopped: impl Future<Output = ()>) -> Result<bool> {
    let mut stopped = pin!(stopped);
    let (fleet, fine) = tokio::select! {
        shown = show(options) => shown?,
        () = &mut stopped => bail!("stopped by a signal"),
    };
    if options.keep {
        invite(&fleet);
        stopped.await;
    }
    drop(fleet);
    Ok(fine)
}

async fn show(options: Options) -> Result<(Fleet, bool)> {
    let mut fleet = Fleet::start().await?;
    let why = fleet.agent.unavailable();
    if let Some(why) = &why {
        println!("\nTHIS MACHINE DOES NOT STEER: {why}");
        println!("Every byte is relayed in user space. `penstock doctor` says what to do about it.");
        if !options.allow_relay {
            println!("That counts as a failure here; --allow-relay accepts it.");
        }
    }
    println!();
    let fine = tour::run(&mut fleet, why.is_none()).await? && (why.is_none() || options.allow_relay);
    println!();
    if why.is_none() {
        load::compare(&fleet).await?;
    } else {
        println!("skipped the comparison of CPU time: steering is off");
    }
    println!("\n{}", if fine { "all checks passed" } else { "CHECKS FAILED: see above" });
    Ok((fleet, fine))
}

fn invite(fleet: &Fleet) {
    let (agent, admin) = (fleet.agent.address, fleet.agent.admin);
    println!(
        r#"
It runs until Ctrl-C. Requests of your own:

  curl -N http://{agent}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"model":"sample","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="http://{agent}/v1", api_key="none")
  for part in client.chat.completions.create(
      model="sample", stream=True, messages=[{{"role": "user", "content": "Hello"}}]
  ):
      print(part.choices[0].delta.content or "", end="", flush=True)

  metrics: http://{admin}/metrics   readiness: http://{admin}/readyz?verbose"#
    );
}

/// `1,234,567`
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn digits_are_grouped_from_the_right() {
        let texts = [0, 999, 1000, 1_234_567].map(super::grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}
