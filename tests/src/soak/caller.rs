//! A soak client: one request after another, of every kind, over one kind of connection to the agent.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use h2::client::Builder;
use tokio::net::TcpStream;

use super::faults::Fault;
use super::ledger::Ledger;
use super::subject::Subject;
use super::visit::{Pool, Visit};
use super::world::World;
use crate::tls::TlsStream;
use crate::{Client, Http2Client, Random, Request, Response};

/// Pause between two requests: the machine should be busy, not saturated.
const REST: Duration = Duration::from_millis(20);
/// Upper bound for any request, however many faults there are.
const PATIENCE: Duration = Duration::from_secs(45);

/// How a client talks to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Http1,
    Http2,
    Tls,
    TlsHttp2,
}

impl Way {
    pub(super) const ALL: [Self; 4] = [Self::Http1, Self::Http2, Self::Tls, Self::TlsHttp2];
}

enum Connection {
    Http1(Client),
    Http2(Http2Client),
    Tls(Box<Client<TlsStream<TcpStream>>>),
}

impl Connection {
    async fn open(way: Way, subject: &Subject, world: &World) -> Result<Self> {
        let addr = subject.agent.addr;
        Ok(match way {
            Way::Http1 => Self::Http1(Client::connect(addr).await?),
            Way::Http2 => Self::Http2(Http2Client::connect(addr).await?),
            Way::Tls => {
                let stream = world.certificate.connect(subject.tls, &["http/1.1"]).await?;
                Self::Tls(Box::new(Client::over(stream, subject.tls)))
            }
            Way::TlsHttp2 => {
                let stream = world.certificate.connect(subject.tls, &["h2"]).await?;
                let authority = format!("localhost:{}", subject.tls.port());
                Self::Http2(Http2Client::over(stream, "https", &authority, &mut Builder::new()).await?)
            }
        })
    }

    async fn request(&mut self, request: &Request) -> Result<Response> {
        match self {
            Self::Http1(client) => client.request(request).await,
            Self::Http2(client) => client.request(request).await,
            Self::Tls(client) => client.request(request).await,
        }
    }
}

pub(super) struct Caller<'a> {
    subject: &'a Subject,
    world: &'a World,
    random: Random,
    way: Way,
    ledger: &'a RefCell<Ledger>,
    number: usize,
    count: u64,
}

impl<'a> Caller<'a> {
    pub(super) fn new(
        subject: &'a Subject,
        world: &'a World,
        random: Random,
        way: Way,
        ledger: &'a RefCell<Ledger>,
    ) -> Self {
        Self { subject, world, random, way, ledger, number: world.number(), count: 0 }
    }

    pub(super) async fn run(&mut self, until: Instant) {
        let mut kept = None;
        while Instant::now() < until {
            self.count += 1;
            let name = format!("{}-{}", self.number, self.count);
            let visit = Visit::choose(&mut self.random, name);
            let begin = Instant::now();
            let fresh = self.random.one_in(6);
            let done = tokio::time::timeout(PATIENCE, self.visit(kept.take().filter(|_| !fresh), &visit)).await;
            match done.unwrap_or_else(|_| bail!("not finished after {PATIENCE:?}")) {
                Ok(connection) => {
                    kept = connection;
                    self.ledger.borrow_mut().done();
                }
                Err(error) => self.failed(&visit, begin, &error),
            }
            self.subject.set_progress(&self.ledger.borrow());
            tokio::time::sleep(REST).await;
        }
    }

    async fn visit(&self, kept: Option<Connection>, visit: &Visit) -> Result<Option<Connection>> {
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(self.way, self.subject, self.world).await?,
        };
        let request = visit.request();
        if let Some(patience) = visit.leaves_after {
            // A killed client: its connection ends with it.
            let _ = tokio::time::timeout(patience, connection.request(&request)).await;
            return Ok(None);
        }
        let response = connection.request(&request).await?;
        visit.check(&response, &self.world.stable)?;
        let closes = response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        ensure!(!closes || self.way == Way::Http1 || self.way == Way::Tls, "HTTP/2 with a Connection field");
        Ok((!closes).then_some(connection))
    }

    fn failed(&self, visit: &Visit, begin: Instant, error: &anyhow::Error) {
        let may = match visit.pool {
            Pool::Mortal => Some(Fault::EndpointDies),
            Pool::Linked => Some(Fault::LinkGoesDown),
            Pool::Stable | Pool::Epp | Pool::Lease => None,
        };
        let explained = may.is_some_and(|fault| self.world.faults.explain(fault, begin));
        self.ledger.borrow_mut().failed(&format!("{:?} {visit:?}", self.way), error, explained);
    }
}
