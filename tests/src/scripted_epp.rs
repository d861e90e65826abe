//! A scripted endpoint picker. A [`Script`] handles each kind of message. Some behave like real pickers ([`Gie`], [`LlmdRouter`],
//! [`Lwepp`], [`Dynamo`]), others fail ([`Faulty`]), gather requests ([`Gathering`]) or evict them ([`Evicting`]).
//!
//! Like Go servers it sends its HTTP/2 headers with its first message and handles a stream's messages one at a time (a waiting
//! script blocks the sender through flow control). It records everything it receives.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use parking_lot::Mutex;
use penstock_proto::ext_proc::{HttpBody, HttpHeaders, HttpTrailers};
use penstock_proto::health::health_check_response::ServingStatus;
use tokio::sync::Notify;
use tonic::Status;
use tonic::transport::ServerTlsConfig;

use crate::own_runtime::OwnRuntime;

mod answering;
mod books;
mod elected;
mod evicting;
mod exchange;
mod fault;
mod gathering;
mod personality;
mod record;
mod server;
#[cfg(test)]
mod tests;
mod transport;

pub use answering::Answering;
pub use books::{Books, Tokens};
pub use elected::{Elected, Election, Follower};
pub use evicting::{After as EvictAfter, Evicting};
pub use exchange::{Exchange, reply};
pub use fault::{Fault, Faulty, Harm, Moment};
pub use gathering::Gathering;
pub use personality::{Dynamo, Endpoints, Gie, LlmdRouter, Lwepp, Personality, Production, Refusal};
pub use record::{StreamEnd, StreamRecord, header};

/// Why a script ends a stream.
#[derive(Debug)]
pub enum End {
    /// Closes it with status OK.
    Close,
    Status(Status),
    /// Resets its TCP connection with every other stream on it.
    ResetConnection,
    /// Acts like a killed process: all connections and the port close.
    Die,
}

/// What happens to a new TCP connection before anything is read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    Serve,
    /// Kept open, with nothing read or written.
    Silent,
    Reset,
}

pub type Answer = Result<(), End>;

/// One picker's behaviour. A method's future is dropped at its await if the peer cancels the stream.
#[tonic::async_trait]
pub trait Script: Send + Sync + 'static {
    fn accept(&self) -> Accept {
        Accept::Serve
    }

    /// The health status of `service`.
    fn health(&self, _service: &str) -> Result<ServingStatus, Status> {
        Ok(ServingStatus::Serving)
    }

    async fn request_headers(&self, _exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        Ok(())
    }

    /// The body so far, including this piece, is in `exchange.request_body`.
    async fn request_body(&self, _exchange: &mut Exchange, _body: &HttpBody) -> Answer {
        Ok(())
    }

    async fn request_trailers(&self, _exchange: &mut Exchange, _trailers: &HttpTrailers) -> Answer {
        Ok(())
    }

    async fn response_headers(&self, exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        exchange.send(reply::response_headers(&[])).await
    }

    async fn response_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        exchange.send(reply::response_body(body.body.clone(), body.end_of_stream)).await
    }

    async fn response_trailers(&self, exchange: &mut Exchange, _trailers: &HttpTrailers) -> Answer {
        exchange.send(reply::response_trailers()).await
    }

    /// The peer sends nothing more; afterwards the stream closes with status OK.
    async fn half_close(&self, _exchange: &mut Exchange) -> Answer {
        Ok(())
    }
}

#[derive(Default)]
struct Record {
    streams: Mutex<Vec<StreamRecord>>,
    accepted: AtomicU64,
    open: Arc<AtomicU64>,
    health: Mutex<Vec<String>>,
}

/// How a picker is served.
#[derive(Clone)]
pub struct Setup {
    /// Default: a free port of 127.0.0.1.
    pub address: SocketAddr,
    /// Default: none.
    pub tls: Option<ServerTlsConfig>,
    /// Concurrent streams per connection; default: no limit.
    pub max_streams: Option<u32>,
    /// Whether streams and their messages are recorded, which costs time and memory for each. Default: true.
    pub records: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, 0).into(), tls: None, max_streams: None, records: true }
    }
}

/// A running picker. Dropping it acts like [`Self::stop`].
pub struct ScriptedEpp {
    pub addr: SocketAddr,
    setup: Setup,
    script: Arc<dyn Script>,
    record: Arc<Record>,
    go_away: Arc<Notify>,
    runtime: Option<OwnRuntime>,
}

impl ScriptedEpp {
    /// Returns once the port is open. Runs on its own thread.
    pub async fn start(script: impl Script) -> Result<Self> {
        Self::start_with(Setup::default(), script).await
    }

    /// Like [`Self::start`].
    pub async fn start_with(setup: Setup, script: impl Script) -> Result<Self> {
        let (addr, script, go_away) = (setup.address, Arc::new(script), Arc::default());
        let mut epp = Self { addr, setup, script, record: Arc::default(), go_away, runtime: None };
        epp.restart().await?;
        Ok(epp)
    }

    /// Sends GOAWAY on the open connections, like servers that limit connection age: started streams continue, others need another
    /// connection. The port stays open.
    pub fn go_away(&self) {
        self.go_away.notify_one();
    }

    /// Closes all connections and the port at once; new connections are refused. The record stays.
    pub fn stop(&mut self) {
        self.runtime = None;
        for stream in &mut *self.record.streams.lock() {
            stream.end.get_or_insert(StreamEnd::Killed);
        }
    }

    /// Starts again on the same port, after [`Self::stop`] or [`End::Die`]. The record continues.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop();
        let setup = Setup { address: self.addr, ..self.setup.clone() };
        let server = server::Server::new(setup, Arc::clone(&self.script), Arc::clone(&self.record));
        let go_away = Arc::clone(&self.go_away);
        let begin = move || server.listen(go_away);
        let (addr, runtime) = OwnRuntime::start("scripted-epp", begin).await?;
        self.addr = addr;
        self.runtime = Some(runtime);
        Ok(())
    }

    /// All streams so far, in order of their start.
    #[must_use]
    pub fn streams(&self) -> Vec<StreamRecord> {
        self.record.streams.lock().clone()
    }

    #[must_use]
    pub fn streams_started(&self) -> usize {
        self.record.streams.lock().len()
    }

    #[must_use]
    pub fn streams_open(&self) -> usize {
        self.record.streams.lock().iter().filter(|stream| stream.end.is_none()).count()
    }

    /// What the picker has learned from each stream, in order of their start.
    #[must_use]
    pub fn books(&self) -> Vec<Books> {
        self.record.streams.lock().iter().map(Books::of).collect()
    }

    /// Streams with this end.
    #[must_use]
    pub fn streams_ended(&self, end: StreamEnd) -> usize {
        self.record.streams.lock().iter().filter(|stream| stream.end == Some(end)).count()
    }

    /// The services of the health checks received, in order.
    #[must_use]
    pub fn health_checks(&self) -> Vec<String> {
        self.record.health.lock().clone()
    }

    #[must_use]
    pub fn connections_accepted(&self) -> u64 {
        self.record.accepted.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn connections_open(&self) -> u64 {
        self.record.open.load(Ordering::Relaxed)
    }
}
