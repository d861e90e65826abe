//! Health checks of a pool's endpoints (`[pools.health]`): one GET per endpoint and interval, each on a new connection.
//!
//! The checks are spread over the interval. An endpoint has at most one check in progress.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::{HeaderValue, Request, Response, StatusCode, Uri, header, uri::PathAndQuery};
use http_body_util::Empty;
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use super::{
    local_fault::local_fault,
    set::{EndpointSet, Snapshot},
    tls::EndpointTls,
};
use crate::{
    config::{AppProtocol, HealthCheck},
    metrics::Metrics,
};

pub(super) struct Checks {
    pub(super) pool: String,
    /// The pool's index in the metrics.
    pub(super) index: usize,
    pub(super) rules: HealthCheck,
    /// The endpoints' protocol.
    pub(super) protocol: AppProtocol,
    pub(super) tls: Option<Arc<EndpointTls>>,
    pub(super) set: Arc<EndpointSet>,
    pub(super) metrics: Arc<Metrics>,
}

#[derive(Debug, Error)]
enum CheckError {
    #[error("no response within {0:?}")]
    Timeout(Duration),
    #[error("connecting failed: {0}")]
    Connect(io::Error),
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("no valid response: {0}")]
    Http(#[from] hyper::Error),
    #[error("status {0}")]
    Status(StatusCode),
}

impl CheckError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Http(_) => "http",
            Self::Status(_) => "status",
        }
    }
}

impl Checks {
    /// Checks the endpoints until the future is dropped.
    pub(super) async fn run(self) {
        let mut running = FuturesUnordered::new();
        let mut busy: Vec<SocketAddr> = Vec::new();
        let mut round = Instant::now();
        loop {
            let snapshot = self.set.snapshot();
            let addresses: Vec<_> = snapshot.ready().map(|endpoint| endpoint.address).collect();
            let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
            let moment = |at: usize| round + (self.rules.interval / count).saturating_mul(at as u32);
            // The last item, `None`, is the end of the round.
            for (at, address) in addresses.iter().map(Some).chain([None]).enumerate() {
                let then = if address.is_some() { moment(at) } else { round + self.rules.interval };
                loop {
                    tokio::select! {
                        biased;
                        Some(done) = running.next() => busy.retain(|&address| address != done),
                        () = sleep_until(then) => break,
                    }
                }
                if let Some(&address) = address.filter(|address| !busy.contains(address)) {
                    busy.push(address);
                    running.push(self.check(Arc::clone(&snapshot), address));
                }
            }
            // Missed rounds are skipped.
            round = (round + self.rules.interval).max(Instant::now());
        }
    }

    /// Checks one endpoint of the snapshot and records the result. Returns its address.
    async fn check(&self, snapshot: Arc<Snapshot>, address: SocketAddr) -> SocketAddr {
        let limit = self.rules.timeout;
        let result = timeout(limit, send_check(address, &self.rules.path, self.protocol, self.tls.as_deref()))
            .await
            .unwrap_or(Err(CheckError::Timeout(limit)));
        if let Err(CheckError::Connect(error)) = &result
            && let Some(fault) = local_fault(error)
        {
            // A local fault does not count against the endpoint.
            tracing::warn!(pool = self.pool, %address, %error, "health check failed, local fault");
            self.metrics.local_fault(fault);
            return address;
        }
        if let Err(error) = &result {
            tracing::debug!(pool = self.pool, %address, %error, "health check failed");
            self.metrics.pool(self.index).check_failed(error.reason());
        }
        let changed = snapshot.get(address).is_some_and(|endpoint| endpoint.checked(result.is_ok(), &self.rules));
        match result {
            Ok(()) if changed => tracing::info!(pool = self.pool, %address, "endpoint recovered"),
            Err(error) if changed => {
                tracing::warn!(pool = self.pool, %address, %error, "endpoint failed its health checks");
            }
            _ => {}
        }
        address
    }
}

/// Sends a GET and expects a 2xx status. The connection is closed after the head.
async fn send_check(
    address: SocketAddr,
    path: &PathAndQuery,
    protocol: AppProtocol,
    tls: Option<&EndpointTls>,
) -> Result<(), CheckError> {
    let tcp = TcpStream::connect(address).await.map_err(CheckError::Connect)?;
    match tls {
        None => ask(tcp, address, path, protocol).await,
        Some(tls) => ask(tls.connect(tcp, address).await.map_err(CheckError::Tls)?, address, path, protocol).await,
    }
}

async fn ask(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    address: SocketAddr,
    path: &PathAndQuery,
    protocol: AppProtocol,
) -> Result<(), CheckError> {
    let io = TokioIo::new(io);
    let mut request = Request::new(Empty::<Bytes>::new());
    request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static("penstock-health-check"));
    let status = match protocol {
        AppProtocol::Http1 | AppProtocol::Https => {
            let (mut sender, connection) = http1::handshake(io).await?;
            *request.uri_mut() = path.clone().into();
            let headers = request.headers_mut();
            headers.extend(HeaderValue::from_str(&address.to_string()).ok().map(|host| (header::HOST, host)));
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            status(sender.send_request(request), connection).await?
        }
        AppProtocol::H2c => {
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            let uri = Uri::builder().scheme("http").authority(address.to_string()).path_and_query(path.clone());
            *request.uri_mut() = uri.build().unwrap_or_default();
            status(sender.send_request(request), connection).await?
        }
    };
    if status.is_success() { Ok(()) } else { Err(CheckError::Status(status)) }
}

/// Returns the response's status and drives the connection meanwhile.
async fn status(
    response: impl Future<Output = hyper::Result<Response<Incoming>>>,
    connection: impl Future,
) -> hyper::Result<StatusCode> {
    let mut response = pin!(response);
    let response = tokio::select! {
        response = &mut response => response,
        // The connection ended, with or without a response.
        _ = connection => response.await,
    };
    Ok(response?.status())
}
