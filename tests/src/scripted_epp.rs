//! An endpoint picker that does what a test says. A [`Script`] has a method for each kind of message, with a default for
//! each; ready ones behave as the pickers in the field do ([`Gie`], [`LlmdRouter`], [`Lwepp`], [`Dynamo`]), [`Faulty`] lets any
//! of them fail at a chosen moment, [`Gathering`] lets requests wait for each other, and [`Evicting`] lets them take their
//! decision back.
//!
//! Like servers in Go it sends its HTTP/2 headers only with its first message, takes the messages of a stream one at a
//! time (a script that waits holds up the sender through the flow-control window), and it records everything it takes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use penstock_proto::ext_proc::external_processor_server::{ExternalProcessor, ExternalProcessorServer};
use penstock_proto::ext_proc::processing_request::Request;
use penstock_proto::ext_proc::{HttpBody, HttpHeaders, HttpTrailers, ProcessingRequest, ProcessingResponse};
use penstock_proto::health::health_check_response::ServingStatus;
use penstock_proto::health::health_server::{Health, HealthServer};
use penstock_proto::health::{HealthCheckRequest, HealthCheckResponse};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::own_runtime::OwnRuntime;
use transport::{Cut, Cutter, Incoming};

mod answering;
mod evicting;
mod exchange;
mod fault;
mod gathering;
mod personality;
mod record;
#[cfg(test)]
mod tests;
mod transport;

pub use answering::Answering;
pub use evicting::{After as EvictAfter, Evicting};
pub use exchange::{Exchange, reply};
pub use fault::{Fault, Faulty, Harm, Moment};
pub use gathering::Gathering;
pub use personality::{Dynamo, Endpoints, Gie, LlmdRouter, Lwepp, Personality, Production, Refusal};
pub use record::{StreamEnd, StreamRecord, header};

/// Replies under way to the peer, beyond which a script waits for it.
const REPLIES: usize = 64;
/// A stream's HTTP/2 window, as Go's server has it at first.
const WINDOW: u32 = 65_535;
/// All streams together have more: h2, unlike Go's server, closes a connection for the small frames that wait on it, and
/// allows fewer of them the smaller this is. A burst of requests is to be taken, not punished.
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Why a script wants no more of a stream.
#[derive(Debug)]
pub enum End {
    /// Closes it with status OK.
    Close,
    Status(Status),
    /// Resets the TCP connection it came on, and every other stream of it.
    ResetConnection,
    /// The picker is gone, as when its process is killed: all connections closed, the port too.
    Die,
}

/// What is done with a TCP connection before anything is read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accept {
    Serve,
    /// It is kept, and nothing is read or written.
    Silent,
    Reset,
}

pub type Answer = Result<(), End>;

/// One picker's behaviour. A method is dropped where it waits when the peer cancels the stream.
#[tonic::async_trait]
pub trait Script: Send + Sync + 'static {
    fn accept(&self) -> Accept {
        Accept::Serve
    }

    /// What the health service says about `service`.
    fn health(&self, _service: &str) -> ServingStatus {
        ServingStatus::Serving
    }

    async fn request_headers(&self, _exchange: &mut Exchange, _headers: &HttpHeaders) -> Answer {
        Ok(())
    }

    /// The body so far, this piece included, is in `exchange.request_body`.
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

    /// The peer will send no more; afterwards the stream is closed with status OK.
    async fn half_close(&self, _exchange: &mut Exchange) -> Answer {
        Ok(())
    }
}

#[derive(Default)]
struct Record {
    streams: Mutex<Vec<StreamRecord>>,
    accepted: AtomicU64,
    open: Arc<AtomicU64>,
}

/// A running picker. Dropping it is as [`Self::stop`].
pub struct ScriptedEpp {
    pub addr: SocketAddr,
    script: Arc<dyn Script>,
    record: Arc<Record>,
    runtime: Option<OwnRuntime>,
}

impl ScriptedEpp {
    /// Returns once the port is open, on a thread of its own.
    pub async fn start(script: impl Script) -> Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut epp = Self { addr: any, script: Arc::new(script), record: Arc::default(), runtime: None };
        epp.restart().await?;
        Ok(epp)
    }

    /// Kills all connections at once and closes the port: from then on it refuses. The record stays.
    pub fn stop(&mut self) {
        self.runtime = None;
        for stream in &mut *self.record.streams.lock() {
            stream.end.get_or_insert(StreamEnd::Killed);
        }
    }

    /// Starts again on the same port, after [`Self::stop`] or [`End::Die`]. The record goes on.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop();
        let (addr, script, record) = (self.addr, Arc::clone(&self.script), Arc::clone(&self.record));
        let begin = move || listen(addr, script, record);
        let (addr, runtime) = OwnRuntime::start("scripted-epp", begin).await?;
        self.addr = addr;
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Everything so far, a stream each, in the order of their start.
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

    /// Streams that ended so.
    #[must_use]
    pub fn streams_ended(&self, end: StreamEnd) -> usize {
        self.record.streams.lock().iter().filter(|stream| stream.end == Some(end)).count()
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

async fn listen(addr: SocketAddr, script: Arc<dyn Script>, record: Arc<Record>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(addr).await.with_context(|| format!("listening on {addr}"))?;
    let addr = listener.local_addr()?;
    let die = Arc::new(Notify::new());
    let (connections, incoming) = mpsc::channel(16);
    let server = Server { script: Arc::clone(&script), record: Arc::clone(&record), die: Arc::clone(&die) };
    tokio::spawn(accept(listener, script, record, die, connections));
    let grpc = tonic::transport::Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .add_service(ExternalProcessorServer::new(server.clone()))
        .add_service(HealthServer::new(server));
    tokio::spawn(grpc.serve_with_incoming(ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>)));
    Ok(addr)
}

/// Accepts until the picker dies: then the port is closed first and the connections after it, so that whoever sees the end
/// of a connection finds the port closed.
async fn accept(
    listener: TcpListener,
    script: Arc<dyn Script>,
    record: Arc<Record>,
    die: Arc<Notify>,
    connections: mpsc::Sender<Incoming>,
) {
    let (all, cut) = watch::channel(Cut::None);
    let mut silent = Vec::new();
    loop {
        let stream = tokio::select! {
            () = die.notified() => {
                drop(listener);
                all.send_replace(Cut::Fin);
                return;
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => continue,
            },
        };
        let number = record.accepted.fetch_add(1, Ordering::Relaxed) + 1;
        let connection = Incoming::new(stream, number, &record.open, cut.clone());
        match script.accept() {
            Accept::Serve => {
                if connections.send(connection).await.is_err() {
                    return;
                }
            }
            Accept::Silent => silent.push(connection),
            Accept::Reset => connection.reset(),
        }
    }
}

#[derive(Clone)]
struct Server {
    script: Arc<dyn Script>,
    record: Arc<Record>,
    die: Arc<Notify>,
}

#[tonic::async_trait]
impl ExternalProcessor for Server {
    type ProcessStream = BoxStream<'static, Result<ProcessingResponse, Status>>;

    async fn process(
        &self,
        request: tonic::Request<Streaming<ProcessingRequest>>,
    ) -> Result<tonic::Response<Self::ProcessStream>, Status> {
        let connection = request.extensions().get::<Cutter>().cloned();
        let connection = connection.ok_or_else(|| Status::internal("a stream without a connection"))?;
        let index = {
            let mut streams = self.record.streams.lock();
            streams.push(StreamRecord::new(connection.number));
            streams.len() - 1
        };
        let (replies, mut replied) = mpsc::channel(REPLIES);
        tokio::spawn(self.clone().stream(request.into_inner(), Exchange::new(replies), index, connection));
        // HTTP/2 headers go with the first message, and a failure without one needs no others.
        match replied.recv().await {
            Some(Ok(first)) => {
                let all = futures_util::stream::iter([Ok(first)]).chain(ReceiverStream::new(replied));
                Ok(tonic::Response::new(all.boxed()))
            }
            Some(Err(status)) => Err(status),
            None => Ok(tonic::Response::new(futures_util::stream::empty().boxed())),
        }
    }
}

impl Server {
    /// One stream from its first message to its end.
    async fn stream(
        self,
        mut messages: Streaming<ProcessingRequest>,
        mut exchange: Exchange,
        index: usize,
        connection: Cutter,
    ) {
        let replies = exchange.replies();
        let script = self.play(&mut messages, &mut exchange, index);
        let (end, outcome) = tokio::select! {
            biased;
            ended = script => ended,
            () = replies.closed() => (StreamEnd::Cancelled, Ok(())),
        };
        // The record first: a test that sees the stream's end is to find it there.
        self.record.streams.lock()[index].end.get_or_insert(end);
        match outcome {
            Ok(()) | Err(End::Close) => {}
            Err(End::Status(status)) => {
                let _ = replies.send(Err(status)).await;
            }
            Err(End::ResetConnection) => {
                connection.cut(Cut::Reset);
                // The stream stays as it is until the connection is gone.
                replies.closed().await;
            }
            Err(End::Die) => {
                self.die.notify_one();
                replies.closed().await;
            }
        }
    }

    async fn play(
        &self,
        messages: &mut Streaming<ProcessingRequest>,
        exchange: &mut Exchange,
        index: usize,
    ) -> (StreamEnd, Answer) {
        loop {
            let outcome = match messages.message().await {
                Ok(Some(message)) => {
                    self.record.streams.lock()[index].took(message.clone(), Instant::now());
                    self.message(exchange, message).await
                }
                Ok(None) => {
                    // tonic shows a reset as an end in good manners too. What tells them apart, the replies that nobody
                    // takes any more, is known when the tasks that were woken together with this one have run.
                    for _ in 0..4 {
                        tokio::task::yield_now().await;
                    }
                    return (StreamEnd::HalfClosed, self.script.half_close(exchange).await);
                }
                Err(_) => return (StreamEnd::Cancelled, Ok(())),
            };
            if outcome.is_err() {
                return (StreamEnd::Script, outcome);
            }
        }
    }

    async fn message(&self, exchange: &mut Exchange, message: ProcessingRequest) -> Answer {
        exchange.metadata = message.metadata_context;
        if message.protocol_config.is_some() {
            exchange.protocol_config = message.protocol_config;
        }
        let script = &self.script;
        match message.request {
            Some(Request::RequestHeaders(headers)) => {
                exchange.request_headers = record::pairs(headers.headers.as_ref());
                script.request_headers(exchange, &headers).await
            }
            Some(Request::RequestBody(body)) => {
                exchange.request_body.extend_from_slice(&body.body);
                script.request_body(exchange, &body).await
            }
            Some(Request::RequestTrailers(trailers)) => script.request_trailers(exchange, &trailers).await,
            Some(Request::ResponseHeaders(headers)) => {
                exchange.response_headers = record::pairs(headers.headers.as_ref());
                script.response_headers(exchange, &headers).await
            }
            Some(Request::ResponseBody(body)) => script.response_body(exchange, &body).await,
            Some(Request::ResponseTrailers(trailers)) => script.response_trailers(exchange, &trailers).await,
            None => Err(End::Status(Status::invalid_argument("a message of no kind"))),
        }
    }
}

#[tonic::async_trait]
impl Health for Server {
    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, Status> {
        let status = self.script.health(&request.into_inner().service);
        Ok(tonic::Response::new(HealthCheckResponse { status: status.into() }))
    }
}
