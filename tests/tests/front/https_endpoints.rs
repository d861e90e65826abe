//! Endpoints that speak TLS: whom the agent trusts, whose connections it reuses, and what it reports. That the bytes are right is
//! shown by the exchanges of every protocol pair.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use penstock_agent::config::{
    AppProtocol, ClientCertificate, HealthCheck, HostPattern, KeyPin, Pool, PoolTls, Route, ServerTls, SteeringMode,
};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Request,
    agent::{TestAgent, builtin_pool},
    client::Pace,
    eventually,
    model_server::{Framing, Options},
    stage::{echo, json},
    tls::{Certificate, TlsFront},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::SOON;

fn pool(name: &str, address: SocketAddr, tls: PoolTls) -> Pool {
    Pool { name: name.to_owned(), app_protocol: AppProtocol::Https, tls: Some(tls), ..builtin_pool(&[address]) }
}

fn insecure() -> PoolTls {
    PoolTls { verify: ServerTls::Insecure, ..PoolTls::default() }
}

fn agent(pool: Pool, mode: SteeringMode) -> TestAgent {
    TestAgent::start(pool, mode, |config| config.listen.workers = 1)
}

async fn server() -> ModelServer {
    ModelServer::start(Options::default()).await.unwrap()
}

fn pem(folder: &tempfile::TempDir, name: &str, certificate: &Certificate) -> (PathBuf, PathBuf) {
    let folder = folder.path().join(name);
    std::fs::create_dir(&folder).unwrap();
    certificate.write(&folder).unwrap()
}

#[tokio::test]
async fn each_verification_accepts_only_valid_endpoints() {
    let (server, folder) = (server().await, tempfile::tempdir().unwrap());
    let [ours, other, client] = [(); 3].map(|()| Certificate::new("models.example").unwrap());
    let front = TlsFront::start(server.addr, ours.server(None).unwrap()).await.unwrap();
    let strict = TlsFront::start(server.addr, ours.server(Some(&client)).unwrap()).await.unwrap();
    let ((ours_file, _), (other_file, other_key)) = (pem(&folder, "ours", &ours), pem(&folder, "other", &other));
    let (certificate, key) = pem(&folder, "client", &client);
    let (ca, by_other) = (ServerTls::Ca(ours_file), ServerTls::Ca(other_file.clone()));
    let pins = |certificate: &Certificate| ServerTls::Pinned(vec![KeyPin(certificate.pin())]);
    let shown = Some(ClientCertificate { certificate, key });
    let wrong = Some(ClientCertificate { certificate: other_file, key: other_key });
    let refused = Some("endpoint_tls");
    // A server of TLS 1.3 refuses a client's certificate after the handshake.
    let rows = [
        ("the IP address", front.addr, ca.clone(), None, None, None),
        ("the name", front.addr, ca.clone(), Some("models.example"), None, None),
        ("another name", front.addr, ca.clone(), Some("elsewhere.example"), None, refused),
        ("another CA", front.addr, by_other, None, None, refused),
        ("a pinned key", front.addr, pins(&ours), Some("elsewhere.example"), None, None),
        ("another pinned key", front.addr, pins(&other), None, None, refused),
        ("insecure", front.addr, ServerTls::Insecure, None, None, None),
        ("an endpoint without TLS", server.addr, ServerTls::Insecure, None, None, refused),
        ("a client certificate", strict.addr, ca.clone(), None, shown, None),
        ("another client certificate", strict.addr, ca.clone(), None, wrong, Some("endpoint_closed")),
        ("no client certificate", strict.addr, ca, None, None, Some("endpoint_closed")),
    ];
    for (row, address, verify, name, client_certificate, expected) in rows {
        let tls = PoolTls { verify, server_name: name.map(str::to_owned), client_certificate };
        let agent = agent(pool("default", address, tls), SteeringMode::Off);
        let mut client = Client::connect(agent.addr).await.unwrap();
        let response = client.request(&echo(json("m", 1000))).await.unwrap();
        match expected {
            None => assert_eq!(response.status(), 200, "{row}: {}", response.text()),
            Some(reason) => {
                assert_eq!((response.status(), response.error_code().as_str()), (502, reason), "{row}");
            }
        }
    }
}

/// A connection that one pool has verified serves no request of a pool that verifies differently.
#[tokio::test]
async fn connections_are_not_shared_between_tls_settings() {
    let (server, folder) = (server().await, tempfile::tempdir().unwrap());
    let [ours, other] = [(); 2].map(|()| Certificate::new("models.example").unwrap());
    let front = TlsFront::start(server.addr, ours.server(None).unwrap()).await.unwrap();
    let by_other = ServerTls::Ca(pem(&folder, "other", &other).0);
    let strict = pool("strict", front.addr, PoolTls { verify: by_other, ..PoolTls::default() });
    let plain = Pool { name: "plain".to_owned(), ..builtin_pool(&[front.addr]) };
    let agent = TestAgent::start(pool("open", front.addr, insecure()), SteeringMode::Off, |config| {
        config.listen.workers = 1;
        config.pools.extend([strict, plain]);
        let route =
            |pool: &str| Route { hosts: vec![HostPattern::Exact(format!("{pool}.example"))], ..Route::to(pool) };
        config.routes = vec![route("open"), route("strict"), route("plain")];
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    for _ in 0..3 {
        let mut to = async |host: &str| client.request(&echo("{}").header("host", host)).await.unwrap();
        assert_eq!(to("open.example").await.status(), 200);
        assert_eq!(to("strict.example").await.error_code(), "endpoint_tls");
        // The TLS server takes the request for a broken handshake and answers with an alert.
        assert_eq!(to("plain.example").await.status(), 502);
    }
    assert_eq!(server.requests(), 3);
    assert_eq!(agent.count("penstock_endpoint_connections_total", &["result=\"reused\""]), 2);
}

/// A kernel path would redirect encrypted bytes.
#[tokio::test]
async fn responses_are_relayed_in_every_mode() {
    let server = server().await;
    let tls = Certificate::new("models.example").unwrap().server(None).unwrap();
    let front = TlsFront::start(server.addr, tls).await.unwrap();
    for mode in [SteeringMode::Ingress, SteeringMode::Local, SteeringMode::Auto] {
        let agent = agent(pool("default", front.addr, insecure()), mode);
        let mut client = Client::connect(agent.addr).await.unwrap();
        for framing in [Framing::ContentLength, Framing::Chunked] {
            let plan = Plan { size: 3 << 20, framing, ..Plan::default() };
            client.send(&plan.request()).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut checker = plan.checker();
            let read = client.read_body(Pace::Fast, |bytes| Ok(checker.feed(bytes)?)).await.unwrap();
            assert_eq!((read.end, read.len), (BodyEnd::Complete, plan.size), "{mode:?} {framing:?}");
        }
        assert_eq!(agent.steered(), 0);
        let flows = ["path=\"relay\"", "reason=\"endpoint_tls\""];
        eventually(SOON, || agent.count("penstock_flows_total", &flows) == 2).await;
    }
}

#[tokio::test]
async fn health_checks_use_the_tls_settings() {
    let (server, folder) = (server().await, tempfile::tempdir().unwrap());
    let [ours, other] = [(); 2].map(|()| Certificate::new("models.example").unwrap());
    let front = TlsFront::start(server.addr, ours.server(None).unwrap()).await.unwrap();
    for (name, trusted, state) in [("ours", &ours, "ready"), ("other", &other, "unhealthy")] {
        let verify = ServerTls::Ca(pem(&folder, name, trusted).0);
        let interval = Duration::from_millis(20);
        let rules = HealthCheck { interval, unhealthy_after: 2, ..HealthCheck::new("/health".parse().unwrap()) };
        let pool = pool("default", front.addr, PoolTls { verify, ..PoolTls::default() });
        let agent = agent(Pool { health: Some(rules), ..pool }, SteeringMode::Off);
        if state == "unhealthy" {
            eventually(SOON, || agent.count("penstock_endpoint_check_failures_total", &["reason=\"tls\""]) >= 2).await;
        } else {
            let before = server.requests();
            eventually(SOON, || server.requests() >= before + 3).await;
        }
        let is = |state: &str| agent.count("penstock_endpoints", &[&format!("state=\"{state}\"")]) == 1;
        eventually(SOON, || is(state)).await;
    }
}

/// The body has no length: only close_notify shows that nothing is missing.
#[tokio::test]
async fn end_without_close_notify_is_not_the_end_of_a_body() {
    let certificate = Certificate::new("models.example").unwrap();
    for says_goodbye in [true, false] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(certificate.server(None).unwrap());
        let agent = agent(pool("default", listener.local_addr().unwrap(), insecure()), SteeringMode::Off);
        let serve = async move {
            let mut tls = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
            let _ = tls.read(&mut [0; 4096]).await.unwrap();
            tls.write_all(b"HTTP/1.1 200 OK\r\n\r\nthe beginning").await.unwrap();
            tls.flush().await.unwrap();
            if says_goodbye {
                tls.shutdown().await.unwrap();
            } else {
                tls.get_mut().0.shutdown().await.unwrap();
            }
            // Waits until the agent has closed, so that nothing is reset.
            let _ = tls.get_mut().0.read(&mut [0; 1]).await;
        };
        let ask = async {
            let mut client = Client::connect(agent.addr).await.unwrap();
            client.send(&Request::get("/")).await.unwrap();
            assert_eq!(client.head().await.unwrap().status, 200);
            let mut body = Vec::new();
            let read = client
                .read_body(Pace::Fast, |bytes| {
                    body.extend_from_slice(bytes);
                    Ok(())
                })
                .await
                .unwrap();
            assert_eq!(body, b"the beginning");
            assert_eq!(read.end == BodyEnd::Complete, says_goodbye, "{:?}", read.end);
        };
        tokio::join!(serve, ask);
    }
}
