//! A short run of `cargo xtask soak`: every steering mode, every kind of traffic and fault.

use std::time::Duration;

use penstock_tests::{
    Random,
    soak::{self, Options},
};

#[tokio::test]
async fn short_soak_loses_and_leaks_nothing() {
    let options = Options { time: Duration::from_secs(24), seed: Random::fresh_seed(), mode: None };
    println!("seed {}", options.seed);
    let report = soak::run(options, |line| println!("{line}")).await.unwrap_or_else(|error| panic!("{error:#}"));
    report.lines.iter().for_each(|line| println!("{line}"));
    assert!(report.complaints.is_empty(), "{}", report.complaints.join("\n"));
}
