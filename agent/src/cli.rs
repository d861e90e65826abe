//! The subcommands and their flags. Exit codes: 0 success, 1 failure, 64 invalid configuration or command line
//! (EX_USAGE); `doctor` also uses 2 and 3.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser};
use penstock_agent::{
    capability,
    command::{detach, prepare},
    config::{self, Bpffs, Config, ConfigErrors, Overrides, SteeringMode},
    epp_server::{self, EppServerConfig, EppServerLimits, EppServerTls},
    logging, panics,
    run::{self, Activated, Signals, StartWith},
    trial::{self, Trial},
};
use tracing_subscriber::EnvFilter;

use crate::doctor;

pub(crate) const USAGE: u8 = 64;

/// Routes each inference request to the endpoint its picker chooses, and steers the response in the kernel.
#[derive(Parser)]
#[command(name = "penstock", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Log filter in tracing's syntax, such as `info,penstock::access=off`.
    #[arg(long, global = true, env = "PENSTOCK_LOG", default_value = "info")]
    log: String,
    #[arg(long, global = true, env = "PENSTOCK_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Maximum bytes of log lines that wait to be written. Further lines are dropped and counted.
    #[arg(long, global = true, env = "PENSTOCK_LOG_QUEUE_BYTES", default_value_t = NonZeroUsize::MIN.saturating_add((8 << 20) - 1), value_name = "BYTES")]
    log_queue_bytes: NonZeroUsize,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the agent.
    Run(Configured),
    /// The same as `penstock config check`.
    Check(Configured),
    /// Report what this machine lets the agent do, and how to fix what is missing.
    #[command(
        after_help = "Exit codes:\n  0   every path is ready\n  1   no path is ready: the agent relays every byte in user space\n  \
                      2   some path is off; the output says which\n  \
                      3   an EPP or an endpoint of the configuration does not work; the output says which setting mends it\n  64  the configuration or the command line is wrong"
    )]
    Doctor(Doctor),
    /// End the flows of path `wire` whose agents are gone, and remove the kernel programs that carry them.
    #[command(
        after_help = "Looks at this network namespace. Leaves agents alone that are running.\n\nExit codes:\n  0   nothing is left\n  \
                      1   an agent is running, or something could not be removed\n  64  the configuration is wrong"
    )]
    Detach(Detach),
    /// Serve the built-in picker over ext_proc, for Envoy or another Penstock.
    Epp(EppArgs),
    /// Print the version.
    Version,
    /// Help with the configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
}

#[derive(Subcommand)]
enum ConfigVerb {
    /// Print every setting with its default and what it means.
    Default,
    /// Print the JSON Schema of the configuration.
    Schema,
    /// Print the reference of all settings, in Markdown.
    Reference,
    /// Validate the configuration and the files that it names, and print the errors.
    Check(Configured),
}

#[derive(Args)]
struct Configured {
    #[arg(long, env = "PENSTOCK_CONFIG", default_value = "/etc/penstock/penstock.toml")]
    config: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Args)]
struct Doctor {
    /// Read `[steering]` from this file, as `penstock run` would, and try each EPP and endpoint that it names; without it, use
    /// the defaults
    #[arg(long, env = "PENSTOCK_CONFIG")]
    config: Option<PathBuf>,
    /// Try the kernel program even on a kernel that is known to lose or repeat bytes in sockmap
    #[arg(long, env = "PENSTOCK_FORCE", value_parser = clap::builder::BoolishValueParser::new())]
    force: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Detach {
    /// Read `steering.bpffs` and `process.user` from this file; without it, use the defaults
    #[arg(long, env = "PENSTOCK_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Args)]
struct EppArgs {
    /// The address to listen on; the default port is that of the production EPP.
    #[arg(long, default_value = "0.0.0.0:9002")]
    listen: SocketAddr,
    /// `ip:port`, once for each endpoint.
    #[arg(long = "endpoint", required = true)]
    endpoints: Vec<SocketAddr>,
    #[arg(long, value_enum, default_value = "self-signed")]
    tls: TlsArgs,
    /// Answer 429 if every eligible endpoint has this many requests in flight.
    #[arg(long, value_parser = at_least_one())]
    max_inflight: Option<usize>,
    /// Wait before each answer, in milliseconds; for tests.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Requests with the same value of this header go to the same endpoint. If given several times, the first header
    /// that a request has counts.
    #[arg(long = "session-header")]
    session_headers: Vec<http::HeaderName>,
    /// Maximum size of a request body, in bytes.
    #[arg(long, default_value_t = 10 << 20, value_parser = at_least_one())]
    max_body: usize,
    /// User and group to become if started as root, `uid:gid`, or `keep`. The file of --client-ca has to be
    /// readable for this user.
    #[arg(long, value_parser = user, default_value = "65534:65534")]
    user: UserOrKeep,
    /// With TLS: accept only clients whose certificate is signed by a CA in this file (PEM).
    #[arg(long, value_name = "FILE")]
    client_ca: Option<PathBuf>,
    /// Maximum number of concurrent connections; further ones are closed.
    #[arg(long, default_value_t = EppServerLimits::default().connections, value_parser = at_least_one())]
    max_connections: usize,
    /// Maximum number of concurrent streams, one per request until its response has ended; further ones get
    /// RESOURCE_EXHAUSTED.
    #[arg(long, default_value_t = EppServerLimits::default().streams, value_parser = at_least_one())]
    max_streams: usize,
    /// Maximum bytes of request bodies held for all streams; further requests are answered with 503.
    #[arg(long, default_value_t = EppServerLimits::default().held_bytes, value_parser = at_least_one())]
    max_held: usize,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

#[derive(Clone, Copy)]
struct UserOrKeep(Option<config::User>);

fn user(text: &str) -> Result<UserOrKeep, String> {
    config::parse_user(text).map(UserOrKeep).map_err(|expected| format!("expected {expected}"))
}

#[derive(Clone, Copy, ValueEnum)]
enum TlsArgs {
    Off,
    SelfSigned,
}

impl Cli {
    pub(crate) fn run(self) -> ExitCode {
        // Takes inherited descriptors before anything opens one.
        let activated = if matches!(self.verb, Verb::Run(_)) { Activated::take() } else { Ok(Activated::default()) };
        // Drops capabilities while this is the only thread. Commands other than `run` and `epp` keep the capabilities
        // they were started with.
        let serves = matches!(self.verb, Verb::Run(_) | Verb::Epp(_));
        let narrowed = if serves { capability::begin() } else { Ok(()) };
        // Reads the files while the process is still root; root is dropped before a second thread exists.
        let config = match &self.verb {
            Verb::Run(configured) => match configured.read() {
                Ok(config) => Some(config),
                Err(errors) => {
                    eprintln!("{errors}");
                    return ExitCode::from(USAGE);
                }
            },
            _ => None,
        };
        let process = match &self.verb {
            Verb::Epp(epp) => Some(config::Process { user: epp.user.0, ..config::Process::default() }),
            _ => config.as_ref().map(|config| config.process.clone()),
        };
        let wire = config.as_ref().filter(|config| config.steering.mode == SteeringMode::Wire);
        if let Some(config) = wire
            && let Some(user) = config.process.user
        {
            prepare(&config.steering.bpffs, user.gid);
        }
        let became = process.map_or(Ok(()), |process| capability::become_user(&process, wire.is_some()));
        // Flushes the queued lines when it is dropped.
        let writer = capability::with(&[], || start_logging(&self.log, self.log_format, self.log_queue_bytes.get()));
        let _writer = match writer {
            Ok(writer) => writer,
            Err(error) => return report(Err(error)),
        };
        panics::install();
        if let Err(error) = narrowed {
            tracing::warn!(%error, "failed to drop capabilities");
        }
        if let Err(error) = became {
            tracing::warn!(error = format!("{error:#}"), "could not change the user, staying root");
        }
        match self.verb {
            Verb::Run(configured) => report(config.context("the configuration was not read").and_then(|config| {
                config.log_warnings();
                let signals = Signals::install()?;
                let start = StartWith::prepare(&config, activated?)?;
                run::start_and_run(config, start, signals, move || configured.read()).map(|()| ExitCode::SUCCESS)
            })),
            Verb::Check(configured) | Verb::Config { verb: ConfigVerb::Check(configured) } => check(&configured),
            Verb::Doctor(doctor) => doctor.run(),
            Verb::Detach(detach) => report(detach.run()),
            Verb::Epp(epp) => report(epp.serve()),
            Verb::Version => {
                println!("penstock {}", env!("CARGO_PKG_VERSION"));
                ExitCode::SUCCESS
            }
            Verb::Config { verb: ConfigVerb::Default } => print(&config::default_toml()),
            Verb::Config { verb: ConfigVerb::Schema } => print(&config::json_schema()),
            Verb::Config { verb: ConfigVerb::Reference } => print(&config::reference()),
        }
    }
}

impl Doctor {
    fn run(self) -> ExitCode {
        let overrides = Overrides { force: self.force, ..Overrides::default() };
        let config = self.config.as_ref().map(|path| Config::load_with(path, &overrides)).transpose();
        let config = match config {
            Ok(config) => config,
            Err(errors) => {
                eprintln!("{errors}");
                return ExitCode::from(USAGE);
            }
        };
        let defaults = || config::Steering { force: self.force, ..config::Steering::default() };
        let steering = config.as_ref().map_or_else(defaults, |config| config.steering.clone());
        doctor::run(steering, config.as_ref().zip(self.config.as_deref()), self.json)
    }
}

impl Detach {
    fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.config.as_ref().map(|path| Config::load_with(path, &Overrides::default())).transpose();
        let config = match config {
            Ok(config) => config,
            Err(errors) => {
                eprintln!("{errors}");
                return Ok(ExitCode::from(USAGE));
            }
        };
        let place = config.map_or(Bpffs::Auto, |config| config.steering.bpffs);
        let done = detach(&place).map_err(|error| anyhow::anyhow!("cannot detach: {}", error.reason()))?;
        println!("flows ended: {}, agents' folders removed: {}", done.flows, done.instances);
        for folder in &done.alive {
            println!("left alone: {folder}: its agent is running");
        }
        Ok(if done.alive.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Configured {
    fn read(&self) -> Result<Config, ConfigErrors> {
        Config::load_with(&self.config, &self.overrides)
    }
}

fn check(configured: &Configured) -> ExitCode {
    match configured.read() {
        Ok(config) => {
            for warning in &config.warnings {
                eprintln!("{warning}");
            }
            for Trial { name, found, advice, .. } in trial::unreadable(&config, &configured.config) {
                eprintln!("warning: {name}: {found}; {}", advice.unwrap_or_default());
            }
            let (file, pools, routes) = (configured.config.display(), config.pools.len(), config.routes.len());
            println!("{file} is valid: {pools} pools, {routes} routes");
            ExitCode::SUCCESS
        }
        Err(errors) => {
            eprintln!("{errors}");
            ExitCode::from(USAGE)
        }
    }
}

fn print(text: &str) -> ExitCode {
    print!("{text}");
    ExitCode::SUCCESS
}

fn report(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("penstock: {error:#}");
        ExitCode::FAILURE
    })
}

/// Logs to stderr through a separate thread, so that a slow log reader never blocks a worker.
fn start_logging(filter: &str, format: LogFormat, queue_bytes: usize) -> anyhow::Result<logging::LogGuard> {
    let (filter, text) = match logging::filter::parse(filter) {
        Ok(parsed) => (parsed, filter),
        Err(error) => {
            eprintln!("penstock: --log {filter}: {error}; logging at level info");
            (EnvFilter::new("info"), "info")
        }
    };
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr()) && matches!(format, LogFormat::Text);
    let (writer, guard) =
        logging::start(std::io::stderr(), queue_bytes, colours).context("cannot start the log thread")?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(colours);
    match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            logging::filter::installed(text, move |filter| handle.reload(filter));
            builder.init();
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            logging::filter::installed(text, move |filter| handle.reload(filter));
            builder.init();
        }
    }
    Ok(guard)
}

impl EppArgs {
    fn serve(self) -> anyhow::Result<ExitCode> {
        anyhow::ensure!(
            self.client_ca.is_none() || matches!(self.tls, TlsArgs::SelfSigned),
            "--client-ca needs --tls self-signed"
        );
        let client_ca = self.client_ca.as_deref().map(epp_server::client_ca).transpose()?;
        let twice = self.endpoints.iter().enumerate().find(|(index, one)| self.endpoints[..*index].contains(one));
        if let Some((_, twice)) = twice {
            anyhow::bail!("--endpoint {twice} is given twice, expected each endpoint once");
        }
        let config = EppServerConfig {
            listen: self.listen,
            endpoints: self.endpoints,
            tls: match self.tls {
                TlsArgs::Off => EppServerTls::Off,
                TlsArgs::SelfSigned => EppServerTls::SelfSigned,
            },
            max_inflight: self.max_inflight,
            delay: (self.delay_ms > 0).then(|| Duration::from_millis(self.delay_ms)),
            max_body: self.max_body,
            session_headers: self.session_headers,
            client_ca,
            limits: EppServerLimits {
                connections: self.max_connections,
                streams: self.max_streams,
                held_bytes: self.max_held,
                ..EppServerLimits::default()
            },
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(config.listen).await;
            let listener = listener.with_context(|| format!("cannot listen on {}", config.listen))?;
            if let Err(error) = capability::keep(&[]) {
                tracing::warn!(%error, "failed to drop capabilities");
            }
            tracing::info!("{}", capability::user());
            tracing::info!(address = %listener.local_addr()?, "penstock epp started");
            epp_server::serve(config, listener, run::terminated()).await
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
