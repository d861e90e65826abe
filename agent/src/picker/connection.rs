//! The HTTP/2 connection to an EPP: one, shared by all requests of a worker, opened when it is needed.
//!
//! Given the EPP's settings, `get` gives the connection that is open, or the outcome of the attempt that is under way: all who
//! wait for it fail together, and the next one tries again. A connection that has failed a stream through its own fault is not
//! handed out again. There is no limit on streams but the server's.
//!
//! tonic's own channel queues requests behind a connect and lets them fail one after the other, each after a timeout of its
//! own; and it may hand out a broken connection once more.

use std::{
    error::Error,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt, Shared};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;

use super::tls;
use crate::config;

/// Replies are at most a few pieces per stream; the window leaves room for a replaced body in one round trip.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// gRPC servers written in Go close connections that ping more often than every five minutes, so pings only find a peer that
/// is stuck; one that is gone is found by TCP.
const PING: Duration = Duration::from_secs(310);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
const GONE: Duration = Duration::from_secs(15);

#[derive(Clone)]
pub struct Connection(Arc<Inner>);

struct Inner {
    address: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
    current: Mutex<Option<Attempt>>,
}

type Attempt = Shared<BoxFuture<'static, Result<Http2, Arc<io::Error>>>>;

impl Connection {
    /// Fails on settings that cannot work. Opens nothing.
    pub fn new(epp: &config::Epp) -> anyhow::Result<Self> {
        let authority: http::uri::Authority = epp.address.parse()?;
        anyhow::ensure!(authority.port().is_some(), "the EPP's address {} has no port", epp.address);
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        Ok(Self(Arc::new(Inner {
            address: epp.address.clone(),
            tls: tls::connector(&epp.tls, host)?,
            timeout: epp.connect_timeout,
            current: Mutex::new(None),
        })))
    }

    /// The URI that streams are opened under.
    pub fn origin(&self) -> anyhow::Result<http::Uri> {
        let scheme = if self.0.tls.is_some() { "https" } else { "http" };
        Ok(http::Uri::builder().scheme(scheme).authority(self.0.address.as_str()).path_and_query("/").build()?)
    }

    /// Cancel-safe: an attempt goes on without those who waited for it.
    pub async fn get(&self) -> Result<Http2, Arc<io::Error>> {
        let attempt = {
            let mut current = self.0.current.lock();
            let usable = current.as_ref().filter(|attempt| match attempt.peek() {
                None => true,
                Some(Ok(http2)) => http2.is_usable(),
                Some(Err(_)) => false,
            });
            match usable {
                Some(attempt) => attempt.clone(),
                None => current.insert(self.attempt()).clone(),
            }
        };
        attempt.await
    }

    fn attempt(&self) -> Attempt {
        let inner = self.0.clone();
        let connect = tokio::spawn(async move {
            let timeout = io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
            tokio::time::timeout(inner.timeout, inner.connect()).await.unwrap_or(Err(timeout)).map_err(Arc::new)
        });
        async move { connect.await.unwrap_or_else(|error| Err(Arc::new(io::Error::other(error)))) }.boxed().shared()
    }
}

impl Inner {
    async fn connect(&self) -> io::Result<Http2> {
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&tcp);
        let (time, interval) = (Duration::from_secs(5), Duration::from_secs(5));
        socket
            .set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(2))?;
        socket.set_tcp_user_timeout(Some(GONE))?;
        match &self.tls {
            None => handshake(TokioIo::new(tcp)).await,
            Some((tls, name)) => handshake(TokioIo::new(tls.connect(name.clone(), tcp).await?)).await,
        }
    }
}

async fn handshake(io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static) -> io::Result<Http2> {
    let (send, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING_TIMEOUT)
        .handshake(io)
        .await
        .map_err(|error| {
            // Keeps the kind: a reset is worth another attempt. It comes wrapped by h2, or bare when h2 had not begun.
            let io = error.source().and_then(|source| {
                source.downcast_ref::<io::Error>().or_else(|| source.downcast_ref::<h2::Error>()?.get_io())
            });
            let kind = io.map_or(io::ErrorKind::Other, io::Error::kind);
            io::Error::new(kind, error)
        })?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(?error, "connection to the EPP ended");
        }
    });
    Ok(Http2 { send, lost: Arc::default() })
}

/// An open connection; clones are the same one.
#[derive(Clone)]
pub struct Http2 {
    send: http2::SendRequest<Body>,
    lost: Arc<AtomicBool>,
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.lost.load(Ordering::Relaxed) && !self.send.is_closed()
    }

    /// Whether a stream's error came from the transport rather than from the server's code. One that is not about the stream
    /// alone takes the connection out of use at once; hyper may take a moment longer to notice.
    pub fn is_transport(&self, status: &tonic::Status) -> bool {
        let Some(source) = status.source() else { return false };
        let mut chain = std::iter::successors(Some(source), |&error: &&(dyn Error + 'static)| error.source());
        let stream_only = chain.any(|error| error.downcast_ref::<h2::Error>().is_some_and(h2::Error::is_reset));
        if !stream_only {
            self.lost.store(true, Ordering::Relaxed);
        }
        true
    }
}

impl tonic::codegen::Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    /// hyper holds back what exceeds the server's limit of streams.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.send.send_request(request))
    }
}
