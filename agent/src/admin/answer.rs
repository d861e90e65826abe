//! The admin server's answer for a request method and target.

use std::{fmt::Write, sync::Arc, time::Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::Mutex;
use serde_json::Value;

use super::flows::{self, AskedFlow};
use crate::{
    kernel::wire::Registry,
    logging::filter::{self, LogFilterError},
    metrics::{self, Metrics},
    readiness::Readiness,
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
}

/// A resource that is answered over loopback alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InsideResource {
    Flows(AskedFlow),
    Pools,
    Log,
}

impl InsideResource {
    /// What a path names; `None` for other paths.
    fn asked(path: &str) -> Option<Self> {
        match path {
            "/pools" => Some(Self::Pools),
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
            return if is_local {
                self.inside.answer(asked, request.method(), request.uri().query())
            } else {
                text(StatusCode::FORBIDDEN, "only over loopback\n".to_owned())
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
    fn answer(&self, asked: InsideResource, method: &Method, query: Option<&str>) -> Response<Full<Bytes>> {
        let reads = matches!(*method, Method::GET | Method::HEAD);
        match asked {
            InsideResource::Flows(flow) => flows::answer(self.flows.as_deref(), method, flow),
            InsideResource::Pools if reads => document(StatusCode::OK, &(self.pools)()),
            InsideResource::Pools => not_allowed("GET, HEAD"),
            InsideResource::Log if reads => match filter::current() {
                Some(current) => text(StatusCode::OK, format!("{current}\n")),
                None => text(StatusCode::NOT_FOUND, format!("{}\n", LogFilterError::Fixed)),
            },
            InsideResource::Log if *method == Method::PUT => log(query.unwrap_or_default()),
            InsideResource::Log => not_allowed("GET, HEAD, PUT"),
        }
    }
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
