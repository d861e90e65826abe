//! An agent with an EPP and one endpoint, and clients; the test chooses the protocols of client and endpoint.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use penstock_agent::config::{AppProtocol, Config, FailureMode, ListenTls, PoolTls, ServerTls, SteeringMode};
use penstock_tests::{
    Client, Http2Client, Http2Options, Http2Server, ModelServer, Request, Response, ScriptedEpp,
    agent::{TestAgent, epp_pool},
    client::{BodyRead, Head, Pace, Piece},
    http2_client::Stream,
    model_server::{Echo, Framing, Options},
    scripted_epp::{Answering, LlmdRouter, Script, reply},
    tls::{Certificate, TlsFront, TlsStream},
};
use tokio::net::TcpStream;

/// The client's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Http1,
    Http2,
    /// HTTP/1.1 and HTTP/2 over TLS.
    Tls1,
    Tls2,
}

/// Clients of HTTP/1.1 in each steering mode, and of the other protocols.
pub(crate) const WAYS: [(Front, SteeringMode); 7] = [
    (Front::Http1, SteeringMode::Off),
    (Front::Http1, SteeringMode::Ingress),
    (Front::Http1, SteeringMode::Local),
    (Front::Http1, SteeringMode::Auto),
    (Front::Http2, SteeringMode::Auto),
    (Front::Tls1, SteeringMode::Auto),
    (Front::Tls2, SteeringMode::Auto),
];
pub(crate) const FRAMINGS: [Framing; 3] = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];

/// The endpoint's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    Http1,
    Http2,
    /// HTTP/1.1 over TLS.
    Https,
}

pub(crate) enum Endpoint {
    Http1(ModelServer),
    Http2(Http2Server),
    Https(ModelServer, TlsFront),
}

pub(crate) struct Scene {
    pub(crate) agent: TestAgent,
    pub(crate) epp: ScriptedEpp,
    pub(crate) endpoint: Endpoint,
    pub(crate) certificate: Certificate,
    front: Front,
    /// The folder with the certificate, if clients use TLS.
    folder: tempfile::TempDir,
}

/// A picker that accepts any request, JSON or not, and changes nothing.
pub(crate) fn first(all: &[SocketAddr]) -> impl Script + use<> {
    let picked = all[0].to_string();
    Answering::new(move |_| vec![reply::pick(&picked, &[])])
}

impl Scene {
    /// With a picker that behaves like a production EPP.
    pub(crate) async fn new(front: Front, back: Back) -> Self {
        Self::with(front, back, LlmdRouter::new, |_| {}).await
    }

    /// `script` gets the endpoint's address; `adjust` changes the configuration.
    pub(crate) async fn with<S: Script>(
        front: Front,
        back: Back,
        script: impl FnOnce(&[SocketAddr]) -> S,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        let endpoint = match back {
            Back::Http1 => Endpoint::Http1(ModelServer::start(Options::default()).await.unwrap()),
            Back::Http2 => Endpoint::Http2(Http2Server::start(Http2Options::default()).await.unwrap()),
            Back::Https => {
                let server = ModelServer::start(Options::default()).await.unwrap();
                let tls = Certificate::new("models.example").unwrap().server(None).unwrap();
                let front = TlsFront::start(server.addr, tls).await.unwrap();
                Endpoint::Https(server, front)
            }
        };
        Self::before(front, endpoint, script, adjust).await
    }

    /// Like [`Self::with`], in front of the caller's own endpoint.
    pub(crate) async fn before<S: Script>(
        front: Front,
        endpoint: Endpoint,
        script: impl FnOnce(&[SocketAddr]) -> S,
        adjust: impl FnOnce(&mut Config),
    ) -> Self {
        let addr = endpoint.addr();
        let epp = ScriptedEpp::start(script(&[addr])).await.unwrap();
        let certificate = Certificate::new("agent.example").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
        let mut pool = epp_pool(&[addr], epp.addr, FailureMode::Closed);
        match endpoint {
            Endpoint::Http1(_) => {}
            Endpoint::Http2(_) => pool.app_protocol = AppProtocol::H2c,
            Endpoint::Https(..) => {
                pool.app_protocol = AppProtocol::Https;
                pool.tls = Some(PoolTls { verify: ServerTls::Insecure, ..PoolTls::default() });
            }
        }
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            if matches!(front, Front::Tls1 | Front::Tls2) {
                let address = SocketAddr::from(([127, 0, 0, 1], 0));
                config.listen.tls = Some(ListenTls { address, cert_file, key_file, ..ListenTls::default() });
            }
            adjust(config);
        });
        Self { agent, epp, endpoint, certificate, front, folder }
    }

    /// The folder of the certificate files.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The address for clients.
    pub(crate) fn addr(&self) -> SocketAddr {
        match self.front {
            Front::Http1 | Front::Http2 => self.agent.addr,
            Front::Tls1 | Front::Tls2 => self.agent.agent.tls_address().unwrap(),
        }
    }

    /// Opens a client connection.
    pub(crate) async fn client(&self) -> Asker {
        let addr = self.addr();
        match self.front {
            Front::Http1 => Asker::Http1(Client::connect(addr).await.unwrap()),
            Front::Http2 => Asker::Http2(Http2Client::connect(addr).await.unwrap(), None),
            Front::Tls1 => {
                let tls = self.certificate.connect(addr, &["http/1.1"]).await.unwrap();
                Asker::Tls1(Client::over(tls, addr))
            }
            Front::Tls2 => {
                let tls = self.certificate.connect(addr, &["h2", "http/1.1"]).await.unwrap();
                assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                let mut settings = h2::client::Builder::new();
                let client = Http2Client::over(tls, "https", "agent.example", &mut settings).await.unwrap();
                Asker::Http2(client, None)
            }
        }
    }

    pub(crate) async fn request(&self, request: &Request) -> Response {
        self.client().await.request(request).await.unwrap()
    }
}

impl Front {
    pub(crate) fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Tls2)
    }
}

/// A client of any protocol, with one request at a time.
#[expect(clippy::large_enum_variant, reason = "one for each test")]
pub(crate) enum Asker {
    Http1(Client),
    Tls1(Client<TlsStream<TcpStream>>),
    /// With the stream of the running request.
    Http2(Http2Client, Option<Stream>),
}

impl Asker {
    pub(crate) async fn request(&mut self, request: &Request) -> Result<Response> {
        self.send(request).await?;
        match self {
            Self::Http1(client) => client.response().await,
            Self::Tls1(client) => client.response().await,
            Self::Http2(_, stream) => stream.as_mut().context("no request was sent")?.response().await,
        }
    }

    pub(crate) async fn send(&mut self, request: &Request) -> Result<()> {
        match self {
            Self::Http1(client) => client.send(request).await,
            Self::Tls1(client) => client.send(request).await,
            Self::Http2(client, stream) => {
                *stream = Some(client.send(request).await?);
                Ok(())
            }
        }
    }

    pub(crate) async fn head(&mut self) -> Result<Head> {
        match self {
            Self::Http1(client) => client.head().await,
            Self::Tls1(client) => client.head().await,
            Self::Http2(_, stream) => stream.as_mut().context("no request was sent")?.head().await,
        }
    }

    pub(crate) async fn piece(&mut self) -> Result<Piece> {
        match self {
            Self::Http1(client) => client.piece(usize::MAX).await,
            Self::Tls1(client) => client.piece(usize::MAX).await,
            Self::Http2(_, stream) => stream.as_mut().context("no request was sent")?.piece().await,
        }
    }

    pub(crate) async fn read_body(&mut self, sink: impl FnMut(&[u8]) -> Result<()>) -> Result<BodyRead> {
        match self {
            Self::Http1(client) => client.read_body(Pace::Fast, sink).await,
            Self::Tls1(client) => client.read_body(Pace::Fast, sink).await,
            Self::Http2(_, stream) => stream.as_mut().context("no request was sent")?.read_body(sink).await,
        }
    }

    /// Cancels the response. The connection of an HTTP/2 client stays open.
    pub(crate) fn leave(self) -> Option<Self> {
        match self {
            Self::Http1(_) | Self::Tls1(_) => None,
            Self::Http2(client, _) => Some(Self::Http2(client, None)),
        }
    }
}

impl Endpoint {
    pub(crate) fn addr(&self) -> SocketAddr {
        match self {
            Self::Http1(server) => server.addr,
            Self::Http2(server) => server.addr,
            Self::Https(_, front) => front.addr,
        }
    }

    /// The address by which the server names itself in its responses.
    pub(crate) fn named(&self) -> SocketAddr {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.addr,
            Self::Http2(server) => server.addr,
        }
    }

    pub(crate) fn requests(&self) -> u64 {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.requests(),
            Self::Http2(server) => server.requests(),
        }
    }

    pub(crate) fn aborted(&self) -> u64 {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.aborted(),
            Self::Http2(server) => server.aborted(),
        }
    }

    pub(crate) fn written(&self) -> u64 {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.written(),
            Self::Http2(server) => server.written(),
        }
    }

    pub(crate) fn connections_accepted(&self) -> u64 {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.connections_accepted(),
            Self::Http2(server) => server.connections_accepted(),
        }
    }

    pub(crate) fn seen(&self) -> Vec<Echo> {
        match self {
            Self::Http1(server) | Self::Https(server, _) => server.seen(),
            Self::Http2(server) => server.seen(),
        }
    }
}
