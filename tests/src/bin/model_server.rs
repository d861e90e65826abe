//! The sample model server as a process, for tests that kill it, for measurements, and for trying Penstock out.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use penstock_tests::model_server::{ModelServer, Options};
use tokio::signal::unix::{SignalKind, signal};

/// Answers OpenAI completion requests with generated tokens.
#[derive(Parser)]
struct Args {
    /// Address and port; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// The model's name.
    #[arg(long, default_value = "sample")]
    model: String,
    /// Microseconds between tokens, unless the request says otherwise.
    #[arg(long, default_value_t = 0)]
    interval_us: u64,
    /// Tokens of a completion, unless the request says otherwise.
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Milliseconds after which a connection without a request is closed; 0 disables this.
    #[arg(long, default_value_t = 5000)]
    idle_close_ms: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = ModelServer::start(Options {
        listen: args.listen,
        model: args.model,
        tokens: args.tokens,
        interval: Duration::from_micros(args.interval_us),
        idle_close: (args.idle_close_ms > 0).then(|| Duration::from_millis(args.idle_close_ms)),
        keep_requests: false,
        ..Options::default()
    })
    .await?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "listening on {}", server.addr)?;
    out.flush()?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
