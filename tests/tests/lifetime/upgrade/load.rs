//! Clients on every listener and protocol that check every byte, and reconnect when the agent asks them to.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use penstock_tests::{
    BodyEnd, Client, Http2Client, Plan,
    agent_process::AgentProcess,
    client::{Pace, Request},
    model_server::{Framing, Lengths, Pauses},
    tls::Certificate,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinHandle,
};

use super::Scene;
/// How long a client waits on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests on one connection, at most.
const ON_ONE: u64 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http1,
    Http2,
    Tls1,
    Tls2,
}

pub(super) struct Load {
    stop: Arc<AtomicBool>,
    /// Complete responses by client.
    counts: Vec<Arc<AtomicU64>>,
    /// What ended clients.
    failures: Arc<Mutex<Vec<String>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// Clients of each kind, some with short responses and some with long ones.
    pub(super) fn start(scene: &Scene, agent: &AgentProcess) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let certificate = Arc::new(Certificate::clone(&scene.certificate));
        let (mut counts, mut tasks, failures) = (Vec::new(), Vec::new(), Arc::<Mutex<Vec<String>>>::default());
        for kind in [Kind::Http1, Kind::Http2, Kind::Tls1, Kind::Tls2] {
            for streams in [false, true] {
                let caller = Caller {
                    kind,
                    streams,
                    plain: agent.addr,
                    tls: agent.tls.unwrap(),
                    certificate: Arc::clone(&certificate),
                    stop: Arc::clone(&stop),
                    count: Arc::new(AtomicU64::new(0)),
                };
                counts.push(Arc::clone(&caller.count));
                let failures = Arc::clone(&failures);
                tasks.push(tokio::spawn(async move {
                    let name = format!("{kind:?}, streams: {streams}");
                    if let Err(error) = caller.run().await {
                        failures.lock().push(format!("{name}: {error:#}"));
                    }
                }));
            }
        }
        Self { stop, counts, failures, tasks }
    }

    /// Returns after every client has got two more responses: the second has begun afterwards.
    pub(super) async fn until_each_has_worked(&self) {
        let before: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let begun = Instant::now();
        while self.counts.iter().zip(&before).any(|(count, before)| count.load(Relaxed) < before + 2) {
            assert!(begun.elapsed() < PATIENCE, "a client got no response: {before:?}, {:?}", self.counts);
            let failed = self.tasks.iter().any(JoinHandle::is_finished);
            assert!(!failed, "a client has failed, {:?}: {:?}", self.counts, self.failures.lock());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the clients. Fails if one of them has.
    pub(super) async fn stop(self) -> Vec<u64> {
        self.stop.store(true, Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        assert_eq!(*self.failures.lock(), Vec::<String>::new());
        self.counts.iter().map(|count| count.load(Relaxed)).collect()
    }
}

struct Caller {
    kind: Kind,
    streams: bool,
    plain: SocketAddr,
    tls: SocketAddr,
    certificate: Arc<Certificate>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
}

impl Caller {
    async fn run(self) -> Result<()> {
        while !self.stop.load(Relaxed) {
            match self.kind {
                Kind::Http1 => self.http1(Client::connect(self.plain).await.context("refused")?).await?,
                Kind::Tls1 => {
                    let stream = self.certificate.connect(self.tls, &["http/1.1"]).await.context("refused")?;
                    self.http1(Client::over(stream, self.tls)).await?;
                }
                Kind::Http2 => self.http2(Http2Client::connect(self.plain).await.context("refused")?).await?,
                Kind::Tls2 => {
                    let stream = self.certificate.connect(self.tls, &["h2"]).await.context("refused")?;
                    let mut settings = h2::client::Builder::new();
                    let client = Http2Client::over(stream, "https", "agent.example", &mut settings).await;
                    self.http2(client.context("refused")?).await?;
                }
            }
        }
        Ok(())
    }

    /// Requests on one connection until the agent asks to close it.
    async fn http1<S: AsyncRead + AsyncWrite + Unpin>(&self, mut client: Client<S>) -> Result<()> {
        client.patience = PATIENCE;
        for _ in 0..ON_ONE {
            let plan = self.plan();
            client.send(&plan.request()).await.context("broken")?;
            let head = client.head().await.context("broken")?;
            ensure!(head.status == 200, "status {}", head.status);
            let closes =
                head.headers.iter().any(|(name, value)| name.eq_ignore_ascii_case("connection") && value == "close");
            let mut checker = plan.checker();
            let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.context("broken")?;
            ensure!((read.end, read.len) == (BodyEnd::Complete, plan.size), "{:?} after {}", read.end, read.len);
            self.count.fetch_add(1, Relaxed);
            if closes || self.stop.load(Relaxed) {
                break;
            }
        }
        Ok(())
    }

    async fn http2(&self, mut client: Http2Client) -> Result<()> {
        client.patience = PATIENCE;
        for _ in 0..ON_ONE {
            let plan = self.plan();
            match self.stream(&mut client, &plan).await {
                Ok(()) => {}
                // The agent has not processed the request, and said so: RFC 9113 §6.8.
                Err(error) if is_unprocessed(&error) => break,
                Err(error) => return Err(error),
            }
            self.count.fetch_add(1, Relaxed);
            if self.stop.load(Relaxed) {
                break;
            }
        }
        Ok(())
    }

    async fn stream(&self, client: &mut Http2Client, plan: &Plan) -> Result<()> {
        let request: Request = plan.request();
        let mut stream = client.send(&request).await.context("broken")?;
        let head = stream.head().await.context("broken")?;
        ensure!(head.status == 200, "status {}", head.status);
        let mut checker = plan.checker();
        let read = stream.read_body(|bytes| Ok(checker.feed(bytes)?)).await.context("broken")?;
        ensure!((read.end, read.len) == (BodyEnd::Complete, plan.size), "{:?} after {}", read.end, read.len);
        Ok(())
    }

    fn plan(&self) -> Plan {
        let stream_id = self.count.load(Relaxed);
        if self.streams {
            let pauses = Some(Pauses { seed: stream_id, every: 1, up_to_us: 4000 });
            let framing = Framing::Chunked;
            Plan { framing, size: 100_000, stream_id, writes: Lengths::Fixed(1000), pauses, ..Plan::default() }
        } else {
            Plan { size: 2000, stream_id, ..Plan::default() }
        }
    }
}

/// Whether a GOAWAY without an error has refused the request.
fn is_unprocessed(error: &anyhow::Error) -> bool {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<h2::Error>());
    error.is_some_and(|error| error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
}

/// Connections to an address, each with a request that nobody has read.
pub(crate) async fn queue(address: SocketAddr, count: usize) -> Vec<Client<TcpStream>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut client = Client::connect(address).await.unwrap();
        client.send(&Request::get(crate::MODELS)).await.unwrap();
        clients.push(client);
    }
    clients
}
