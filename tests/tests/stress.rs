//! Short runs of `cargo xtask stress`: every steering mode, everything else random.

use std::time::Duration;

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Random, alone,
    stress::{self, Options},
};

#[tokio::test]
async fn short_stress_run_in_every_mode_finds_nothing() {
    run(None).await;
}

#[tokio::test]
async fn short_stress_run_of_path_wire_finds_nothing() {
    run(Some(SteeringMode::Wire)).await;
}

async fn run(mode: Option<SteeringMode>) {
    let _alone = alone().await;
    let options = Options { time: Duration::from_secs(12), seed: Random::fresh_seed(), mode };
    println!("seed {}", options.seed);
    let tallies = stress::run(options, |_| {}).await.unwrap_or_else(|error| panic!("{error:#}"));
    let mut complaints = Vec::new();
    for tally in &tallies {
        println!("{tally}");
        complaints.extend(tally.complaints());
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}
