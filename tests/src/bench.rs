//! `cargo xtask bench`: what a request and a token cost Penstock, Envoy with the same EPP, and nginx, under the same load.
//!
//! Model server, EPP and load generator are threads of this process; each proxy has processes of its own. Proxies take turns in
//! rounds, so that a disturbance of the machine hits all of them; figures are medians over rounds, and ratios are those of one round.

mod document;
mod load;
mod proxy;
mod report;
mod scenario;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use proxy::Proxy;
use report::{Machine, Report, Row};
use scenario::{Scenario, Work};

use crate::ModelServer;
use crate::model_server;
use crate::scripted_epp::{Production, ScriptedEpp, Setup};
use crate::thread_cpu::thread_cpu;

/// The programs that are measured.
#[derive(Clone, Debug)]
pub struct Programs {
    pub penstock: PathBuf,
    pub envoy: PathBuf,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub programs: Programs,
    pub rounds: usize,
    /// How long each load of a closed loop lasts.
    pub time: Duration,
    /// Only scenarios whose name contains this.
    pub only: Option<String>,
    /// How a person repeats the run.
    pub command: String,
    /// Where the JSON goes.
    pub json: PathBuf,
    /// Where the document goes, if it is to be written.
    pub document: Option<PathBuf>,
}

/// Measures, prints a table and writes the files. A wrong byte is an error.
pub async fn run(options: &Options) -> Result<()> {
    let begin = Instant::now();
    let machine = Machine::of(&options.programs)?;
    println!("{machine}");
    let keep = model_server::Options { idle_close: None, keep_requests: false, keep_sent: false, ..Default::default() };
    let server = ModelServer::start(keep).await?;
    let setup = Setup { records: false, ..Setup::default() };
    let epp = ScriptedEpp::start_with(setup, Production::new(&[server.addr])).await?;
    let scenarios =
        scenario::all().into_iter().filter(|one| options.only.as_ref().is_none_or(|only| one.name.contains(only)));
    let mut stages = Vec::new();
    for scenario in scenarios {
        let mut proxies = Vec::new();
        for kind in scenario.kinds {
            let proxy = Proxy::start(*kind, &options.programs, epp.addr, server.addr).await?;
            let samples = Vec::with_capacity(options.rounds);
            // The first requests' connections, page faults and code loading are not part of the cost.
            measure(&scenario, &proxy, options.time / 4).await.with_context(|| named(&scenario, &proxy))?;
            proxies.push((proxy, samples));
        }
        stages.push((scenario, proxies));
    }
    println!("every proxy started and warmed up after {:.0} s", begin.elapsed().as_secs_f64());
    for round in 1..=options.rounds {
        for (scenario, proxies) in &mut stages {
            for (proxy, samples) in proxies {
                let sample = measure(scenario, proxy, options.time).await.with_context(|| named(scenario, proxy))?;
                samples.push(sample);
            }
        }
        println!("round {round} of {} ended after {:.0} s", options.rounds, begin.elapsed().as_secs_f64());
    }
    let rows = stages.into_iter().flat_map(|(scenario, proxies)| {
        let samples: Vec<_> = proxies.into_iter().map(|(proxy, samples)| (proxy.kind, samples)).collect();
        Row::of_scenario(&scenario, &samples)
    });
    let report = Report { machine, command: options.command.clone(), rounds: options.rounds, rows: rows.collect() };
    println!("\n{}", report.table());
    write(&options.json, &serde_json::to_string_pretty(&report)?)?;
    if let Some(path) = &options.document {
        write(path, &document::text(&report))?;
    }
    Ok(())
}

fn named(scenario: &Scenario, proxy: &Proxy) -> String {
    format!("{}, {}", scenario.name, proxy.kind.name())
}

/// Renders the document from the JSON of an earlier run.
pub fn render(json: &Path, document: &Path) -> Result<()> {
    let text = std::fs::read_to_string(json).with_context(|| json.display().to_string())?;
    write(document, &document::text(&serde_json::from_str(&text)?))
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text).with_context(|| path.display().to_string())?;
    println!("wrote {}", path.display());
    Ok(())
}

/// One proxy in one round.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// The proxy's CPU time for each unit of the scenario.
    cpu: Duration,
    /// The EPP's for each pick.
    epp: Duration,
    p50: Duration,
    p99: Duration,
    /// Bytes.
    peak_rss: u64,
    /// Requests each second.
    rate: f64,
}

async fn measure(scenario: &Scenario, proxy: &Proxy, time: Duration) -> Result<Sample> {
    proxy.forget_peak()?;
    let (begin, epp_before, before) = (Instant::now(), thread_cpu("scripted-epp")?, proxy.cpu()?);
    let (mut took, cpu) = match &scenario.work {
        Work::Requests(load) => {
            let took = load.run(proxy.address, time).await?;
            let cpu = (proxy.cpu()? - before) / took.len() as u32;
            (took, cpu)
        }
        Work::Streams(streams) => {
            // While every stream runs and none begins or ends.
            let middle = async {
                let (from, to) = streams.middle();
                tokio::time::sleep_until((begin + from).into()).await;
                let (begin, before) = (Instant::now(), proxy.cpu()?);
                tokio::time::sleep_until((begin + (to - from)).into()).await;
                let cpu = proxy.cpu()? - before;
                anyhow::Ok(cpu.div_f64(streams.tokens_in(begin.elapsed())))
            };
            tokio::try_join!(streams.run(proxy.address), middle)?
        }
    };
    let elapsed = begin.elapsed();
    let epp = (thread_cpu("scripted-epp")? - epp_before) / took.len() as u32;
    took.sort_unstable();
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
    let rate = took.len() as f64 / elapsed.as_secs_f64();
    Ok(Sample { cpu, epp, p50: at(0.5), p99: at(0.99), peak_rss: proxy.peak_rss()?, rate })
}
