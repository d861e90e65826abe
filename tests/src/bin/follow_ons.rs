//! `penstock-follow-ons` measures the cost of a follow-on request for each way of picking. One client sends serial requests on one
//! connection; agent, picker, endpoint and client share this process, so its CPU time covers all of them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use nix::sys::resource::{UsageWho, getrusage};
use penstock_agent::config::{FailureMode, PickPer, Pool, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Plan, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    model_server::{Framing, HeadWrites, Options},
    scripted_epp::{Answering, reply},
    thread_cpu::thread_cpu,
};

/// Measures follow-on requests: p50 and total CPU time of each.
#[derive(Parser)]
struct Args {
    /// Requests per measurement
    #[arg(long, default_value_t = 4000)]
    requests: u32,
    /// Only ways whose name contains this text
    #[arg(long, default_value = "")]
    only: String,
    /// Response size in bytes
    #[arg(long, value_delimiter = ',', default_value = "200,4096,65536,262144")]
    sizes: Vec<u64>,
}

/// How a request gets its endpoint.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    /// Directly, without an agent.
    mode: Option<SteeringMode>,
    pick_per: PickPer,
    epp: bool,
}

const NONE: Way = Way { name: "no agent", mode: None, pick_per: PickPer::Request, epp: false };
const AUTO: Way = Way { mode: Some(SteeringMode::Auto), ..NONE };
const OFF: Way = Way { mode: Some(SteeringMode::Off), ..NONE };
const WAYS: [Way; 7] = [
    NONE,
    Way { name: "pick per request, EPP", epp: true, ..AUTO },
    Way { name: "lease, user space", pick_per: PickPer::Lease, epp: true, ..OFF },
    Way { name: "lease", pick_per: PickPer::Lease, epp: true, ..AUTO },
    Way { name: "pick per request, built-in", ..AUTO },
    Way { name: "pinned, user space", pick_per: PickPer::Connection, ..OFF },
    Way { name: "pinned, kernel", pick_per: PickPer::Connection, ..AUTO },
];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let Args { requests, only, sizes } = Args::parse();
    println!("{requests} requests each; p50 µs / CPU µs / CPU µs of the agent's threads");
    print!("{:<28}", "response, bytes");
    sizes.iter().for_each(|size| print!("{size:>24}"));
    println!();
    for way in WAYS.iter().filter(|way| way.name.contains(&only)) {
        print!("{:<28}", way.name);
        for &size in &sizes {
            let (p50, cpu, agent) = measure(way, size, requests).await?;
            print!("{:>24}", format!("{:.1} / {:.1} / {:.1}", micros(p50), micros(cpu), micros(agent)));
        }
        println!();
    }
    Ok(())
}

async fn measure(way: &Way, size: u64, requests: u32) -> Result<(Duration, Duration, Duration)> {
    let server =
        ModelServer::start(Options { idle_close: None, keep_requests: false, keep_sent: false, ..Options::default() })
            .await?;
    let picked = server.addr.to_string();
    let epp = ScriptedEpp::start(Answering::new(move |_| vec![reply::pick(&picked, &[])])).await?;
    let agent = way.mode.map(|mode| {
        let pool = match way.epp {
            true => epp_pool(&[server.addr], epp.addr, FailureMode::Closed),
            false => builtin_pool(&[server.addr]),
        };
        TestAgent::start(Pool { pick_per: way.pick_per, ..pool }, mode, |config| {
            config.listen.workers = 1;
            config.pools[0].lease.requests = 1_000_000;
            config.pools[0].lease.time = Duration::from_secs(3600);
        })
    });
    let mut client = Client::connect(agent.as_ref().map_or(server.addr, |agent| agent.addr)).await?;
    let head = HeadWrites { with_body: true, ..HeadWrites::default() };
    let plan = Plan { framing: Framing::ContentLength, size, head, ..Plan::default() };
    let request = plan.request();
    let mut times = Vec::new();
    for _ in 0..requests / 10 {
        one(&mut client, &request, size).await?;
    }
    let (before, agents_before) = (cpu()?, thread_cpu("penstock-")?);
    for _ in 0..requests {
        let begin = Instant::now();
        one(&mut client, &request, size).await?;
        times.push(begin.elapsed());
    }
    let (spent, agents) = (cpu()? - before, thread_cpu("penstock-")? - agents_before);
    times.sort_unstable();
    Ok((times[times.len() / 2], spent / requests, agents / requests))
}

async fn one(client: &mut Client, request: &penstock_tests::Request, size: u64) -> Result<()> {
    let response = client.request(request).await?;
    ensure!(response.read.len == size, "{} bytes of {size}", response.read.len);
    Ok(())
}

/// User and system time of this process.
fn cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let (user, system) = (usage.user_time(), usage.system_time());
    let micros = user.tv_sec() * 1_000_000 + user.tv_usec() + system.tv_sec() * 1_000_000 + system.tv_usec();
    Ok(Duration::from_micros(micros.try_into()?))
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
