//! The results: medians over rounds, and the medians of each round's ratio to the peers.

use std::fmt::{self, Write as _};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::proxy::Kind;
use super::scenario::Scenario;
use super::{Programs, Sample};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) command: String,
    pub(super) rounds: usize,
    pub(super) rows: Vec<Row>,
}

/// Where and with what it was measured.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) processor: String,
    pub(super) cores: usize,
    pub(super) kernel: String,
    pub(super) envoy: String,
    pub(super) nginx: String,
    pub(super) penstock: String,
}

/// One proxy under one load. Times in microseconds, memory in MiB; a ratio is left out where there is no such peer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) scenario: String,
    pub(super) explanation: String,
    /// `request` or `token`.
    pub(super) unit: String,
    pub(super) proxy: String,
    /// CPU time of the proxy for each unit.
    pub(super) cpu: f64,
    /// The lowest and the highest round.
    pub(super) cpu_range: [f64; 2],
    pub(super) cpu_to_envoy: Option<f64>,
    pub(super) cpu_to_nginx: Option<f64>,
    /// CPU time of the EPP for each pick, if there is one.
    pub(super) epp: Option<f64>,
    pub(super) epp_to_envoy: Option<f64>,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p99_to_envoy: Option<f64>,
    pub(super) p99_to_nginx: Option<f64>,
    pub(super) peak_rss: f64,
    /// Requests each second.
    pub(super) rate: f64,
}

impl Row {
    pub(super) fn of_scenario(scenario: &Scenario, samples: &[(Kind, Vec<Sample>)]) -> Vec<Self> {
        let of = |kind| samples.iter().find(|(other, _)| *other == kind).map(|(_, samples)| samples.as_slice());
        let (envoy, nginx) = (of(Kind::Envoy), of(Kind::Nginx));
        let row = |(kind, own): &(Kind, Vec<Sample>)| {
            // Bodies both ways are compared with bodies both ways.
            let envoy = if *kind == Kind::PenstockUsage { of(Kind::EnvoyBodies).or(envoy) } else { envoy };
            let picks = !matches!(kind, Kind::BuiltIn(_) | Kind::Nginx);
            let cpu = |sample: &Sample| micros(sample.cpu);
            let (p99, epp) = (|sample: &Sample| micros(sample.p99), |sample: &Sample| micros(sample.epp));
            let all: Vec<f64> = own.iter().map(cpu).collect();
            Self {
                scenario: scenario.name.to_owned(),
                explanation: scenario.explanation.to_owned(),
                unit: scenario.work.unit().to_owned(),
                proxy: kind.name(),
                cpu: median(all.clone()),
                cpu_range: [all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(0.0, f64::max)],
                cpu_to_envoy: ratio(own, envoy, cpu).filter(|_| picks),
                cpu_to_nginx: ratio(own, nginx, cpu),
                epp: picks.then(|| median(own.iter().map(epp).collect())),
                epp_to_envoy: ratio(own, envoy, epp).filter(|_| picks),
                p50: median(own.iter().map(|sample| micros(sample.p50)).collect()),
                p99: median(own.iter().map(p99).collect()),
                p99_to_envoy: ratio(own, envoy, p99).filter(|_| picks),
                p99_to_nginx: ratio(own, nginx, p99),
                peak_rss: median(own.iter().map(|sample| sample.peak_rss as f64).collect()) / f64::from(1 << 20),
                rate: median(own.iter().map(|sample| sample.rate).collect()),
            }
        };
        samples.iter().map(row).collect()
    }
}

/// The median of the rounds' ratios.
fn ratio(own: &[Sample], peer: Option<&[Sample]>, of: impl Fn(&Sample) -> f64) -> Option<f64> {
    let rounds = own.iter().zip(peer?).map(|(own, peer)| of(own) / of(peer));
    Some(median(rounds.collect()))
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    f64::midpoint(low, high)
}

impl Report {
    /// For terminals and documents (Markdown).
    pub(super) fn table(&self) -> String {
        let heads = [
            "load", "proxy", "CPU µs", "of Envoy", "of nginx", "EPP µs", "of Envoy", "p50 µs", "p99 µs", "of Envoy",
            "of nginx", "RSS MiB", "req/s",
        ];
        let mut lines = vec![heads.map(str::to_owned).to_vec()];
        for row in &self.rows {
            let ratio = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
            // A token costs much less than a request.
            let cpu = if row.unit == "token" { format!("{:.2}", row.cpu) } else { format!("{:.1}", row.cpu) };
            lines.push(vec![
                row.scenario.clone(),
                row.proxy.clone(),
                cpu,
                ratio(row.cpu_to_envoy),
                ratio(row.cpu_to_nginx),
                row.epp.map_or_else(|| "–".to_owned(), |epp| format!("{epp:.1}")),
                ratio(row.epp_to_envoy),
                format!("{:.0}", row.p50),
                format!("{:.0}", row.p99),
                ratio(row.p99_to_envoy),
                ratio(row.p99_to_nginx),
                format!("{:.0}", row.peak_rss),
                format!("{:.0}", row.rate),
            ]);
        }
        aligned(&lines)
    }
}

/// A Markdown table with columns of equal width; the first two are texts.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            let _ = if column < 2 { write!(text, "| {cell:<width$} ") } else { write!(text, "| {cell:>width$} ") };
        }
        text.push_str("|\n");
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = write!(text, "|-{}{}", "-".repeat(*width), if column < 2 { "-" } else { ":" });
            }
            text.push_str("|\n");
        }
    }
    text
}

impl Machine {
    pub(super) fn of(programs: &Programs) -> Result<Self> {
        let info = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
        let version = |command: &mut Command| -> Result<String> {
            let name = command.get_program().to_string_lossy().into_owned();
            let output = command.output().with_context(|| format!("{name}: run `cargo xtask bench`"))?;
            let text = [output.stdout, output.stderr].concat();
            Ok(String::from_utf8_lossy(&text).trim().to_owned())
        };
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let envoy = version(Command::new(&programs.envoy).arg("--version"))?;
        let nginx = version(Command::new("nginx").arg("-v"))?;
        Ok(Self {
            processor: model.unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism()?.get(),
            // Without what the distributor appends.
            kernel: kernel.trim().split('-').next().unwrap_or_default().to_owned(),
            // `envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`
            envoy: envoy.split('/').rev().nth(3).unwrap_or(&envoy).to_owned(),
            nginx: nginx.rsplit('/').next().unwrap_or(&nginx).to_owned(),
            penstock: version(Command::new(&programs.penstock).arg("--version"))?,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, kernel, envoy, nginx, penstock } = self;
        write!(out, "{cores} cores of {processor}, Linux {kernel}; {penstock}, Envoy {envoy}, nginx {nginx}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(cpu: [u64; 3]) -> Vec<Sample> {
        cpu.map(|micros| Sample { cpu: Duration::from_micros(micros), ..Sample::default() }).to_vec()
    }

    #[test]
    fn ratio_is_the_median_of_the_rounds_ratios() {
        // The machine was three times slower in the last round, for both.
        let (own, peer) = (samples([10, 12, 30]), samples([20, 20, 60]));
        let cpu = |sample: &Sample| micros(sample.cpu);
        assert_eq!(ratio(&own, Some(&peer), cpu), Some(0.5));
        assert_eq!(ratio(&own, None, cpu), None);
    }

    #[test]
    fn median_of_an_even_number_is_between_the_middle_two() {
        assert!((median(vec![4.0, 1.0, 2.0, 100.0]) - 3.0).abs() < f64::EPSILON);
    }
}
