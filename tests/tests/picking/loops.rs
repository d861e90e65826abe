//! Request loops: the agent's own addresses are rejected in every position, and a request that passed this agent before
//! returns 508.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use penstock_agent::config::{
    FailureMode, ListenTls, NamedEndpoints, Network, Passthrough, Picker, Pool, SteeringMode,
};
use penstock_tests::{
    Client, DnsServer, ModelServer, Namespace, Request, ScriptedEpp, TestAgent,
    agent::{builtin_pool, epp_pool},
    eventually,
    model_server::Options,
    scripted_epp::{Production, Setup},
    stage::echo,
    tls::Certificate,
};

use crate::SOON;

fn start(pool: Pool) -> TestAgent {
    TestAgent::start(pool, SteeringMode::Off, |config| config.headers.via = None)
}

/// Reloads the agent with another first pool.
fn change(agent: &TestAgent, adjust: impl FnOnce(&mut Pool)) {
    let mut config = agent.config();
    adjust(&mut config.pools[0]);
    agent.agent.reload(config).unwrap();
}

async fn refused(agent: &TestAgent) -> (u16, String) {
    let mut client = Client::connect(agent.addr).await.unwrap();
    let response = client.request(&Request::get("/test/echo")).await.unwrap();
    (response.status(), response.header("x-penstock-reason").unwrap_or_default().to_owned())
}

/// Two agents in a row are no loop. If the second forwards to the first, the request is rejected on its third hop.
#[tokio::test]
async fn looped_request_returns_508() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let back = start(builtin_pool(&[server.addr]));
    let front = start(builtin_pool(&[back.addr]));
    let mut client = Client::connect(front.addr).await.unwrap();
    let seen = client.request(&echo("{}")).await.unwrap().echoed();
    let marks: Vec<_> = seen.headers.iter().filter(|(name, _)| name == "x-penstock-hop").collect();
    assert_eq!(marks.len(), 2, "{seen:?}");
    assert_ne!(marks[0], marks[1]);

    change(&back, |pool| pool.endpoints = vec![front.addr.into()]);
    let before = server.requests();
    // The first agent's error as the second one forwards it, without the reason.
    let refusal = || async { refused(&front).await.0 == 508 };
    // The other agent's workers may still have the previous configuration.
    let begin = std::time::Instant::now();
    while !refusal().await {
        assert!(begin.elapsed() < SOON);
    }
    assert!(server.requests() - before <= 100);
    let loops = || front.count("penstock_requests_total", &[r#"reason="loop""#]);
    eventually(SOON, || loops() > 0).await;
}

/// The default upstream, a listed endpoint, and the picker's choice.
#[tokio::test]
async fn own_listeners_as_endpoints_are_rejected() {
    let epp_at = |addresses: &[SocketAddr]| {
        let addresses = addresses.to_vec();
        async move { ScriptedEpp::start(Production::new(&addresses)).await.unwrap() }
    };
    let server = ModelServer::start(Options::default()).await.unwrap();
    // An address of this node other than loopback: one for documentation (RFC 5737), which hides no real host.
    let base = 0xcb00_7100 + std::process::id() % (1 << 6) * 4;
    let [node, peer] = [1, 2].map(|host| Ipv4Addr::from(base + host));
    let link = format!("lp{}", std::process::id());
    let _link = Namespace::connected(&link, &format!("{node}/30"), &format!("{peer}/30")).unwrap();
    let (certificate, folder) = (Certificate::new("agent").unwrap(), tempfile::tempdir().unwrap());
    let (cert_file, key_file) = certificate.write(folder.path()).unwrap();
    for listen in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
        let tls = SocketAddr::from((listen, 0));
        let tls = ListenTls {
            address: tls,
            cert_file: cert_file.clone(),
            key_file: key_file.clone(),
            ..ListenTls::default()
        };
        let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
            config.listen.workers = 1;
            config.listen.address.set_ip(listen.into());
            config.listen.tls = Some(tls);
        });
        let port = agent.addr.port();
        let tls_port = agent.agent.tls_address().unwrap().port();
        let mut own = vec![
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::from((Ipv4Addr::LOCALHOST, tls_port)),
            agent.agent.admin_address(),
        ];
        if listen.is_unspecified() {
            own.push(SocketAddr::from(([127, 3, 2, 1], port)));
            own.extend([port, tls_port].map(|port| SocketAddr::from((node, port))));
        }
        // Another server at the same address is somebody else.
        let listen = SocketAddr::from((node, 0));
        let other = ModelServer::start(Options { listen, ..Options::default() }).await.unwrap();
        change(&agent, |pool| pool.endpoints = vec![other.addr.into()]);
        settled(&agent, (200, "")).await;
        for own in own {
            // Listed in the pool.
            change(&agent, |pool| pool.endpoints = vec![own.into()]);
            settled(&agent, (508, "own_listener")).await;
            // The other endpoints are used.
            change(&agent, |pool| pool.endpoints = vec![own.into(), server.addr.into()]);
            settled(&agent, (200, "")).await;
            // Chosen by the picker, outside the pool's list.
            let epp = epp_at(&[own]).await;
            let anywhere = Passthrough::Networks(vec![Network::parse("0.0.0.0/0").unwrap()]);
            let named = Pool { passthrough: anywhere, ..epp_pool(&[], epp.addr, FailureMode::Closed) };
            change(&agent, |pool| *pool = named.clone());
            settled(&agent, (502, "endpoint_not_in_pool")).await;
            // Used by a pool that fails open.
            let opening = Pool { failure_mode: FailureMode::Open, default_upstream: Some(own), ..named };
            change(&agent, |pool| *pool = opening);
            settled(&agent, (508, "own_listener")).await;
        }
    }
}

/// Waits until the agent responds like this: workers take a configuration between requests.
async fn settled(agent: &TestAgent, expected: (u16, &str)) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, agent.addr.port()));
    let begin = std::time::Instant::now();
    loop {
        let mut client = Client::connect(address).await.unwrap();
        let response = client.request(&Request::get("/test/echo")).await.unwrap();
        let found = (response.status(), response.header("x-penstock-reason").unwrap_or_default().to_owned());
        if (found.0, found.1.as_str()) == expected {
            return;
        }
        assert!(begin.elapsed() < SOON, "{found:?}, not {expected:?}");
    }
}

/// `true` lets the picker choose addresses on other machines, not on this one.
#[tokio::test]
async fn passthrough_excludes_own_machine_unless_listed() {
    let server = ModelServer::start(Options::default()).await.unwrap();
    let epp = ScriptedEpp::start(Production::new(&[server.addr])).await.unwrap();
    let pool = epp_pool(&[], epp.addr, FailureMode::Closed);
    let list = |text: &str| Passthrough::Networks(vec![Network::parse(text).unwrap()]);
    for (passthrough, admitted) in
        [(Passthrough::On, false), (list("10.0.0.0/8"), false), (list("127.0.0.0/8"), true), (list("127.0.0.1"), true)]
    {
        let agent = start(Pool { passthrough: passthrough.clone(), ..pool.clone() });
        let expected = if admitted { (200, String::new()) } else { (502, "endpoint_not_in_pool".to_owned()) };
        assert_eq!(refused(&agent).await, expected, "{passthrough:?}");
    }
}

/// At another address of the name, at the same port, is somebody else.
#[tokio::test]
async fn own_listener_is_passed_over_where_a_name_leads_to_it() {
    const NAME: &str = "loop.test";
    const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
    let dns = DnsServer::start().await.unwrap();
    let server = ModelServer::start(Options::default()).await.unwrap();
    let agent = TestAgent::start(builtin_pool(&[server.addr]), SteeringMode::Off, |config| {
        config.listen.workers = 1;
        config.dns.servers = vec![dns.addr];
        config.dns.min_ttl = Duration::from_millis(20);
    });
    let (own, port) = (Ipv4Addr::LOCALHOST.into(), agent.addr.port());
    let name = |addresses: &[IpAddr]| dns.set(NAME, addresses, Duration::ZERO);

    // A picker.
    name(&[own]);
    let mut pool = epp_pool(&[server.addr], agent.addr, FailureMode::Closed);
    if let Picker::Epp(epp) = &mut pool.picker {
        epp.addresses = vec![format!("{NAME}:{port}")];
    }
    change(&agent, |first| *first = pool);
    settled(&agent, (503, "picker_failed")).await;
    assert!(agent.count("penstock_epp_failures_total", &[r#"reason="unresolved""#]) > 0);
    assert_eq!(agent.count("penstock_epp_replicas", &[]), 0);
    let setup = Setup { address: (OTHER, port).into(), ..Setup::default() };
    let epp = ScriptedEpp::start_with(setup, Production::new(&[server.addr])).await.unwrap();
    name(&[own, OTHER.into()]);
    settled(&agent, (200, "")).await;
    assert_eq!(agent.count("penstock_epp_replicas", &[]), 1);
    drop(epp);

    // Endpoints.
    let listen = (OTHER, port).into();
    let other = ModelServer::start(Options { listen, ..Options::default() }).await.unwrap();
    let named = NamedEndpoints { name: NAME.to_owned(), ports: vec![port] };
    change(&agent, |first| *first = Pool { endpoints_dns: Some(named), ..builtin_pool(&[]) });
    settled(&agent, (200, "")).await;
    eventually(SOON, || agent.count("penstock_endpoints", &[]) == 1).await;
    assert!(other.requests() > 0);
}
