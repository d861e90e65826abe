//! E16: TLS to the picker: what each mode must accept and reject, and changed files.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use penstock_agent::config::{ClientCertificate, Config, Epp, FailureMode, KeyPin, ServerTls, SteeringMode};
use penstock_tests::{
    Client, DnsServer, ModelServer, ScriptedEpp,
    agent::{TestAgent, epps_pool},
    scripted_epp::{Production, Setup},
    stage::{echo, epp, json},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PublicKeyData};
use tempfile::TempDir;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::SOON;

/// A certificate authority.
struct Ca(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key.
struct Signed {
    certificate: String,
    key: KeyPair,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn sign(&self, names: &[&str]) -> Signed {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &*self.0).unwrap().pem();
        Signed { certificate, key }
    }
}

impl Signed {
    /// A self-signed certificate, as pickers generate without a configured one.
    fn self_signed_identity() -> Self {
        let key = KeyPair::generate().unwrap();
        Self { certificate: CertificateParams::new([]).unwrap().self_signed(&key).unwrap().pem(), key }
    }

    fn server_config(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().identity(Identity::from_pem(&self.certificate, self.key.serialize_pem()))
    }

    fn pin(&self) -> KeyPin {
        let key = self.key.subject_public_key_info();
        KeyPin(ring::digest::digest(&ring::digest::SHA256, &key).as_ref().try_into().unwrap())
    }
}

async fn picker(endpoint: &ModelServer, tls: ServerTlsConfig) -> ScriptedEpp {
    let setup = Setup { tls: Some(tls), ..Setup::default() };
    ScriptedEpp::start_with(setup, Production::new(&[endpoint.addr])).await.unwrap()
}

async fn endpoint() -> ModelServer {
    ModelServer::start(Default::default()).await.unwrap()
}

fn agent(endpoint: &ModelServer, picker: SocketAddr, adjust: impl FnOnce(&mut Epp)) -> TestAgent {
    let pool = epps_pool(&[endpoint.addr], &[picker], FailureMode::Closed);
    TestAgent::start(pool, SteeringMode::Off, |config: &mut Config| {
        config.listen.workers = 1;
        adjust(epp(config));
    })
}

async fn status(agent: &TestAgent) -> u16 {
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.request(&echo(json("m", 1000))).await.unwrap().status()
}

fn failures(agent: &TestAgent, reason: &str) -> u64 {
    agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")])
}

fn write(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let file = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    file
}

/// Sends requests until one is served: the agent connects again by itself.
async fn until_served(agent: &TestAgent) {
    let begin = Instant::now();
    while status(agent).await != 200 {
        assert!(begin.elapsed() < SOON, "no request was served");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// E16.
#[tokio::test]
async fn each_tls_mode_accepts_only_valid_pickers() {
    let (endpoint, folder) = (endpoint().await, TempDir::new().unwrap());
    let (ours, other) = (Ca::new(), Ca::new());
    let (named, itself) = (ours.sign(&["epp.example", "127.0.0.1"]), Signed::self_signed_identity());
    let picker_named = picker(&endpoint, named.server_config()).await;
    let picker_self_signed = picker(&endpoint, itself.server_config()).await;
    let plain = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let ca = |name: &str, ca: &Ca| ServerTls::Ca(write(&folder, name, &ca.0.pem()));
    let (ours, other) = (ca("ours.pem", &ours), ca("other.pem", &other));
    let pinned = |signed: &[&Signed]| ServerTls::Pinned(signed.iter().map(|signed| signed.pin()).collect());
    let cases = [
        ("plain", &plain, ServerTls::Off, None, true),
        ("TLS with plaintext expected", &picker_named, ServerTls::Off, None, false),
        ("none where TLS is expected", &plain, ServerTls::Insecure, None, false),
        ("insecure", &picker_self_signed, ServerTls::Insecure, None, true),
        ("insecure, with a server name", &picker_self_signed, ServerTls::Insecure, Some("epp.example"), true),
        ("by our CA, for the host", &picker_named, ours.clone(), None, true),
        ("by our CA, for another of its names", &picker_named, ours.clone(), Some("epp.example"), true),
        ("by our CA, for a name it lacks", &picker_named, ours.clone(), Some("other.example"), false),
        ("by another CA", &picker_named, other, None, false),
        ("self-signed, with a CA expected", &picker_self_signed, ours, None, false),
        ("pinned key", &picker_self_signed, pinned(&[&itself]), None, true),
        ("pinned key, one of several", &picker_self_signed, pinned(&[&named, &itself]), Some("whatever"), true),
        ("another pinned key", &picker_self_signed, pinned(&[&named]), None, false),
    ];
    for (case, picker, tls, name, works) in cases {
        let agent = agent(&endpoint, picker.addr, |epp| {
            epp.tls = tls;
            epp.server_name = name.map(str::to_owned);
        });
        let expected = if works { 200 } else { 503 };
        assert_eq!(status(&agent).await, expected, "{case}");
        let failed = failures(&agent, "connect") + failures(&agent, "reset");
        assert_eq!(failed, u64::from(!works), "{case}: {}", agent.agent.metrics().encode());
    }
}

/// E16: the certificate must carry the looked-up name, whatever the address.
#[tokio::test]
async fn certificate_must_match_resolved_name() {
    let (endpoint, folder, dns) = (endpoint().await, TempDir::new().unwrap(), DnsServer::start().await.unwrap());
    dns.set("epp.test", &["127.0.0.1".parse().unwrap()], Duration::from_secs(60));
    dns.set("impostor.test", &["127.0.0.1".parse().unwrap()], Duration::from_secs(60));
    let ca = Ca::new();
    let picker = picker(&endpoint, ca.sign(&["epp.test"]).server_config()).await;
    let file = write(&folder, "ca.pem", &ca.0.pem());
    for (name, expected) in [("epp.test", 200), ("impostor.test", 503)] {
        let pool = epps_pool(&[endpoint.addr], &[], FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            config.dns.servers = vec![dns.addr];
            epp(config).addresses = vec![format!("{name}:{}", picker.addr.port())];
            epp(config).tls = ServerTls::Ca(file.clone());
        });
        assert_eq!(status(&agent).await, expected, "{name}");
    }
}

/// E16: mutual TLS, with each mode of verifying the picker.
#[tokio::test]
async fn mutual_tls_presents_client_certificate() {
    let (endpoint, folder) = (endpoint().await, TempDir::new().unwrap());
    let (servers, clients) = (Ca::new(), Ca::new());
    let server = servers.sign(&["127.0.0.1"]);
    let wants = server.server_config().client_ca_root(Certificate::from_pem(clients.0.pem()));
    let picker = picker(&endpoint, wants).await;
    let shows = |name: &str, signed: &Signed| ClientCertificate {
        certificate: write(&folder, &format!("{name}.pem"), &signed.certificate),
        key: write(&folder, &format!("{name}.key"), &signed.key.serialize_pem()),
    };
    let (good, bad) = (shows("good", &clients.sign(&["agent"])), shows("bad", &servers.sign(&["agent"])));
    let modes = [
        ServerTls::Insecure,
        ServerTls::Ca(write(&folder, "ca.pem", &servers.0.pem())),
        ServerTls::Pinned(vec![server.pin()]),
    ];
    for tls in modes {
        for (client_certificate, expected) in [(Some(&good), 200), (Some(&bad), 503), (None, 503)] {
            let agent = agent(&endpoint, picker.addr, |epp| {
                (epp.tls, epp.client_certificate) = (tls.clone(), client_certificate.cloned());
            });
            assert_eq!(status(&agent).await, expected, "{tls:?} {client_certificate:?}");
        }
    }
}

/// E16: a replaced CA applies to new connections without a restart, and open connections stay.
#[tokio::test]
async fn changed_tls_files_are_reloaded() {
    let (endpoint, folder) = (endpoint().await, TempDir::new().unwrap());
    let (old, new) = (Ca::new(), Ca::new());
    let mut old_picker = picker(&endpoint, old.sign(&["127.0.0.1"]).server_config()).await;
    let file = write(&folder, "ca.pem", &old.0.pem());
    let agent_of_old = agent(&endpoint, old_picker.addr, |epp| epp.tls = ServerTls::Ca(file.clone()));
    assert_eq!(status(&agent_of_old).await, 200);
    // Another agent with the same file, whose picker has already changed its certificate.
    let new_picker = picker(&endpoint, new.sign(&["127.0.0.1"]).server_config()).await;
    let agent_of_new = agent(&endpoint, new_picker.addr, |epp| epp.tls = ServerTls::Ca(file.clone()));
    assert_eq!(status(&agent_of_new).await, 503);

    write(&folder, "ca.pem", &new.0.pem());
    let begin = Instant::now();
    until_served(&agent_of_new).await;
    assert!(begin.elapsed() < SOON / 2, "{:?}", begin.elapsed());
    // The existing connection is unaffected; the next one uses the new CA.
    let workers = agent_of_old.config().listen.workers as u64;
    penstock_tests::eventually(SOON, || old_picker.connections_open() == workers).await;
    assert_eq!((status(&agent_of_old).await, old_picker.connections_accepted()), (200, workers));
    old_picker.restart().await.unwrap();
    names_cause(&agent_of_old, "invalid peer certificate").await;
}

/// E17, E16: health checks use the same TLS settings.
#[tokio::test]
async fn health_checks_use_same_tls() {
    let endpoint = endpoint().await;
    let (signed, other) = (Signed::self_signed_identity(), Signed::self_signed_identity());
    let picker = picker(&endpoint, signed.server_config()).await;
    for (pin, state) in [(signed.pin(), "serving"), (other.pin(), "unreachable")] {
        let agent = agent(&endpoint, picker.addr, |epp| {
            epp.tls = ServerTls::Pinned(vec![pin]);
            epp.health_interval = Some(Duration::from_millis(50));
        });
        let state = format!("state=\"{state}\"");
        penstock_tests::eventually(SOON, || agent.count("penstock_epp_replicas", &[&state]) == 1).await;
    }
}

/// The agent's error for a request, once it contains `cause`.
async fn names_cause(agent: &TestAgent, cause: &str) {
    let (mut client, begin) = (Client::connect(agent.addr).await.unwrap(), Instant::now());
    loop {
        let response = client.request(&penstock_tests::Request::get("/test/echo")).await.unwrap();
        assert_eq!(response.error_code(), "picker_failed");
        if response.text().contains(cause) {
            return;
        }
        assert!(begin.elapsed() < SOON, "{}", response.text());
    }
}

/// Each mistake in the pool's settings is named, with the setting.
#[tokio::test]
async fn error_names_the_protocol_that_the_picker_speaks() {
    let endpoint = endpoint().await;
    let with_tls = picker(&endpoint, Signed::self_signed_identity().server_config()).await;
    names_cause(&agent(&endpoint, with_tls.addr, |_| {}), "the server answered with TLS; set `tls`").await;
    let plain = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    let without = agent(&endpoint, plain.addr, |epp| epp.tls = ServerTls::Insecure);
    names_cause(&without, "the server answered without TLS; set `tls = \\\"off\\\"`").await;
    for tls in [ServerTls::Off, ServerTls::Insecure] {
        let http1 = agent(&endpoint, endpoint.addr, |epp| epp.tls = tls.clone());
        names_cause(&http1, "the server answered with HTTP/1.1; set `address`").await;
    }
}

/// A server that expects TLS and closes other connections without a word, as those written in Go do.
#[tokio::test]
async fn error_names_tls_although_the_picker_closes_silently() {
    let server = penstock_tests::tls_only().unwrap();
    let endpoint = endpoint().await;
    names_cause(&agent(&endpoint, server, |_| {}), "the server answered with TLS; set `tls`").await;
}
