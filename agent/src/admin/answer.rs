//! The admin server's answer for a request method and target.

use std::{fmt::Write, sync::Arc, time::Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Bytes;
use parking_lot::Mutex;

use super::flows;
use crate::{
    kernel::wire::Registry,
    metrics::{self, Metrics},
    readiness::Readiness,
};

pub(super) struct Answers {
    pub(super) metrics: Arc<Metrics>,
    readiness: Readiness,
    flows: Option<Arc<Registry>>,
    verbose: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    scrape: Mutex<Scrape>,
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
        flows: Option<Arc<Registry>>,
    ) -> Self {
        let scrape = Scrape { text: Bytes::new(), allowed: SCRAPES, at: Instant::now() };
        Self { metrics, readiness, flows, verbose, scrape: Mutex::new(scrape) }
    }

    /// `is_local`: the request came over loopback.
    pub(super) fn answer<B>(&self, request: &Request<B>, is_local: bool) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if let Some(flow) = flows::asked(path) {
            return if is_local {
                flows::answer(self.flows.as_deref(), request.method(), flow)
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
