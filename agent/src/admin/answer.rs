//! The admin server's answer for a request method and target.

use std::{fmt::Write, net::IpAddr, sync::Arc, time::Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode, header, uri::Authority};
use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    flows::{self, AskedFlow},
    pools,
};
use crate::{
    kernel::wire::Registry,
    logging::filter::{self, LogFilterError},
    metrics::{self, Metrics},
    readiness::Readiness,
    shared::Shared,
};

pub(super) struct Answers {
    pub(super) metrics: Arc<Metrics>,
    readiness: Readiness,
    inside: Inside,
    verbose: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    scrape: Mutex<Scrape>,
}

/// What is shown and changed over loopback alone.
pub struct Inside {
    /// Those of path `wire`, if it is in use.
    pub flows: Option<Arc<Registry>>,
    /// Describes the pools.
    pub pools: Box<dyn Fn() -> Value + Send + Sync>,
    /// The configuration in force, without secrets.
    pub config: Box<dyn Fn() -> Value + Send + Sync>,
    /// Cancelled to drain and end the agent.
    pub stop: CancellationToken,
}

/// A resource that is answered over loopback alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InsideResource {
    Flows(AskedFlow),
    Pools,
    Config,
    Drain,
    Log,
}

impl InsideResource {
    /// What a path names; `None` for other paths.
    fn asked(path: &str) -> Option<Self> {
        match path {
            "/pools" => Some(Self::Pools),
            "/config" => Some(Self::Config),
            "/drain" => Some(Self::Drain),
            "/log" => Some(Self::Log),
            _ => flows::asked(path).map(Self::Flows),
        }
    }
}

/// The most recently encoded metrics.
struct Scrape {
    text: Bytes,
    /// Tokens left: how often the metrics may be encoded now.
    allowed: f64,
    at: Instant,
}

/// Maximum number of times per second that the metrics are encoded. Further requests get the previous text, which is at
/// most some tens of milliseconds old. Without a limit, scrapes could delay probes on this thread.
const SCRAPES: f64 = 50.0;

impl Answers {
    pub(super) fn new(
        metrics: Arc<Metrics>,
        readiness: Readiness,
        verbose: Box<dyn Fn() -> Vec<String> + Send + Sync>,
        inside: Inside,
    ) -> Self {
        let scrape = Scrape { text: Bytes::new(), allowed: SCRAPES, at: Instant::now() };
        Self { metrics, readiness, inside, verbose, scrape: Mutex::new(scrape) }
    }

    /// `is_local`: the request came over loopback.
    pub(super) fn answer<B>(&self, request: &Request<B>, is_local: bool) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if let Some(asked) = InsideResource::asked(path) {
            return match () {
                () if !is_local => text(StatusCode::FORBIDDEN, "only over loopback\n".to_owned()),
                () if may_be_of_a_page(request) => {
                    let why = "not for web pages: the host must be localhost or an address\n";
                    text(StatusCode::FORBIDDEN, why.to_owned())
                }
                () => self.inside.answer(asked, request.method(), request.uri().query()),
            };
        }
        if !matches!(path, "/livez" | "/readyz" | "/metrics") {
            return text(StatusCode::NOT_FOUND, "not found\n".to_owned());
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return not_allowed("GET, HEAD");
        }
        match path {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => self.readyz(is_verbose(request.uri().query())),
            _ => respond(StatusCode::OK, metrics::CONTENT_TYPE, self.scrape()),
        }
    }

    fn scrape(&self) -> Bytes {
        let mut scrape = self.scrape.lock();
        let now = Instant::now();
        scrape.allowed = (scrape.allowed + (now - scrape.at).as_secs_f64() * SCRAPES).min(SCRAPES);
        scrape.at = now;
        if scrape.allowed >= 1.0 {
            scrape.allowed -= 1.0;
            scrape.text = self.metrics.encode().into();
        }
        scrape.text.clone()
    }

    fn readyz(&self, verbose: bool) -> Response<Full<Bytes>> {
        let mut lines = self.readiness.pending();
        let status = if lines.is_empty() {
            lines.push("ok".to_owned());
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        if verbose {
            lines.extend((self.verbose)());
        }
        let mut body = String::new();
        for line in lines {
            let _ = writeln!(body, "{line}");
        }
        text(status, body)
    }
}

impl Inside {
    /// `updates` yields each state of the agent.
    pub fn new(updates: watch::Receiver<Arc<Shared>>, flows: Option<Arc<Registry>>, stop: CancellationToken) -> Self {
        let of_config = updates.clone();
        // Not read under the lock, for which a reload would wait.
        let pools = move || {
            let shared = Arc::clone(&updates.borrow());
            pools::describe(&shared, Instant::now())
        };
        let config = move || {
            let shared = Arc::clone(&of_config.borrow());
            shared.config.shown()
        };
        Self { flows, pools: Box::new(pools), config: Box::new(config), stop }
    }

    fn answer(&self, asked: InsideResource, method: &Method, query: Option<&str>) -> Response<Full<Bytes>> {
        let reads = matches!(*method, Method::GET | Method::HEAD);
        match asked {
            InsideResource::Flows(flow) => flows::answer(self.flows.as_deref(), method, flow),
            InsideResource::Pools if reads => document(StatusCode::OK, &(self.pools)()),
            InsideResource::Config if reads => document(StatusCode::OK, &(self.config)()),
            InsideResource::Pools | InsideResource::Config => not_allowed("GET, HEAD"),
            InsideResource::Drain if *method == Method::POST => {
                tracing::info!("asked by the admin port to drain");
                self.stop.cancel();
                text(StatusCode::ACCEPTED, "draining\n".to_owned())
            }
            InsideResource::Drain => not_allowed("POST"),
            InsideResource::Log if reads => match filter::current() {
                Some(current) => text(StatusCode::OK, format!("{current}\n")),
                None => text(StatusCode::NOT_FOUND, format!("{}\n", LogFilterError::Fixed)),
            },
            InsideResource::Log if *method == Method::PUT => log(query.unwrap_or_default()),
            InsideResource::Log => not_allowed("GET, HEAD, PUT"),
        }
    }
}

/// Whether a web page in a browser on this machine may have caused the request: it names its origin, or the page's own name leads to
/// loopback and is the host.
fn may_be_of_a_page<B>(request: &Request<B>) -> bool {
    let is_of_machine = |host: &HeaderValue| {
        let authority: Option<Authority> = host.to_str().ok().and_then(|host| host.parse().ok());
        authority.is_some_and(|authority| {
            let host = authority.host().trim_start_matches('[').trim_end_matches(']');
            host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
        })
    };
    let headers = request.headers();
    headers.contains_key(header::ORIGIN) || !headers.get_all(header::HOST).iter().all(is_of_machine)
}

/// Changes what is logged.
fn log(query: &str) -> Response<Full<Bytes>> {
    let wanted = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "filter");
    let wanted = wanted.map(|(_, filter)| filter).unwrap_or_default();
    match filter::set(&wanted) {
        Ok(()) => {
            // An error, so that every filter shows it.
            tracing::error!(filter = %wanted, "the admin port has changed what is logged");
            text(StatusCode::OK, format!("{wanted}\n"))
        }
        Err(error @ LogFilterError::Fixed) => text(StatusCode::NOT_FOUND, format!("{error}\n")),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

pub(super) fn document(status: StatusCode, document: &Value) -> Response<Full<Bytes>> {
    respond(status, "application/json", format!("{document}\n").into())
}

fn is_verbose(query: Option<&str>) -> bool {
    query.is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("verbose")))
}

/// `methods` are allowed.
pub(super) fn not_allowed(methods: &'static str) -> Response<Full<Bytes>> {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("only {methods}\n"));
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(methods));
    answer
}

pub(super) fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body.into())
}

pub(super) fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
