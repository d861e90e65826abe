//! Sessions of the built-in picker, and of a picker with its own session token.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;

use penstock_agent::config::{FailureMode, Pool, SteeringMode};
use penstock_proto::ext_proc::HttpHeaders;
use penstock_tests::{
    Client, ModelServer, Refusing, Request, Stage,
    agent::{TestAgent, builtin_pool, epp_pool},
    scripted_epp::{Answer, Exchange, Script, header, reply},
    stage::{echo, json},
};

const SESSIONS: usize = 20;

async fn servers() -> Vec<ModelServer> {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(ModelServer::start(Default::default()).await.unwrap());
    }
    servers
}

fn with_sessions(pool: Pool) -> TestAgent {
    let names = ["x-session-id", "x-session-affinity"].map(http::HeaderName::from_static);
    TestAgent::start(pool, SteeringMode::Off, |config| config.pools[0].session_headers = names.to_vec())
}

async fn served(client: &mut Client, request: &Request) -> SocketAddr {
    client.request(request).await.unwrap().served_by().unwrap()
}

/// D9: across connections, workers, agents, and orders of the endpoints.
#[tokio::test]
async fn session_requests_reach_one_endpoint() {
    let servers = servers().await;
    let mut addrs: Vec<SocketAddr> = servers.iter().map(|server| server.addr).collect();
    let mut homes: BTreeMap<usize, HashSet<SocketAddr>> = BTreeMap::new();
    for _ in 0..2 {
        addrs.reverse();
        let agent = with_sessions(builtin_pool(&addrs));
        for turn in 0..3 {
            let mut client = Client::connect(agent.addr).await.unwrap();
            for session in 0..SESSIONS {
                let name = ["x-session-id", "X-Session-Affinity"][turn % 2];
                let request = echo(json("m", 100 * turn)).header(name, session.to_string());
                homes.entry(session).or_default().insert(served(&mut client, &request).await);
            }
        }
    }
    assert!(homes.values().all(|home| home.len() == 1), "{homes:?}");
    let used: HashSet<_> = homes.values().flatten().collect();
    assert!(used.len() > 1, "{homes:?}");
}

/// D9: the first nonempty header counts; without one, requests rotate.
#[tokio::test]
async fn requests_without_session_rotate() {
    let servers = servers().await;
    let addrs: Vec<SocketAddr> = servers.iter().map(|server| server.addr).collect();
    let agent = with_sessions(builtin_pool(&addrs));
    let mut client = Client::connect(agent.addr).await.unwrap();
    let mut turns = HashSet::new();
    for _ in 0..3 {
        turns.insert(served(&mut client, &Request::get("/test/echo").header("x-session-id", "")).await);
    }
    assert_eq!(turns.len(), 3);
    let by_second = Request::get("/test/echo").header("x-session-affinity", "7");
    let home = served(&mut client, &by_second).await;
    assert_eq!(served(&mut client, &by_second.clone().header("x-session-id", "")).await, home);
    let by_first = Request::get("/test/echo").header("x-session-id", "7").header("x-session-affinity", "8");
    assert_eq!(served(&mut client, &by_first).await, home);
}

/// D9, D8: while its endpoint is unreachable, a session uses one other; no other session moves.
#[tokio::test]
async fn session_with_dead_endpoint_uses_one_other() {
    let (servers, dead) = (servers().await, Refusing::new().unwrap());
    let agent = with_sessions(builtin_pool(&[servers[0].addr, dead.addr, servers[1].addr]));
    let mut client = Client::connect(agent.addr).await.unwrap();
    let mut homes = BTreeMap::new();
    for _ in 0..3 {
        for session in 0..40 {
            let request = Request::get("/test/echo").header("x-session-id", session.to_string());
            let served = served(&mut client, &request).await;
            assert_eq!(*homes.entry(session).or_insert(served), served, "{session}");
        }
    }
    assert!(agent.count("penstock_endpoint_connections_total", &[r#"result="failed""#]) > 0);
}

/// D9, E11: a pool that fails open keeps sessions together too.
#[tokio::test]
async fn session_in_fail_open_pool_keeps_endpoint() {
    let (servers, refusing) = (servers().await, Refusing::new().unwrap());
    let addrs: Vec<SocketAddr> = servers.iter().map(|server| server.addr).collect();
    let agent = with_sessions(epp_pool(&addrs, refusing.addr, FailureMode::Open));
    let mut client = Client::connect(agent.addr).await.unwrap();
    let request = echo(json("m", 100)).header("x-session-id", "a");
    let homes = [served(&mut client, &request).await, served(&mut client, &request).await];
    let builtin = with_sessions(builtin_pool(&addrs));
    let home = served(&mut Client::connect(builtin.addr).await.unwrap(), &request).await;
    assert_eq!(homes, [home, home]);
}

/// Keeps a session at the endpoint in its token, and issues a token to requests without one.
struct Tokens(Vec<SocketAddr>);

#[tonic::async_trait]
impl Script for Tokens {
    async fn request_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let token = header(&exchange.request_headers, "x-session-token").map(str::to_owned);
        let picked = token.unwrap_or_else(|| self.0[1].to_string());
        exchange.send(reply::pick(&picked, &[])).await
    }

    async fn response_headers(&self, exchange: &mut Exchange, _: &HttpHeaders) -> Answer {
        let served = exchange.served().unwrap_or_default();
        exchange.send(reply::response_headers(&[("x-session-token", &served)])).await
    }
}

/// D9: a field set by the picker on a response reaches the client and returns with its next request, to endpoint and picker.
#[tokio::test]
async fn picker_session_token_is_forwarded_both_ways() {
    let mut stage = Stage::new(|all| Tokens(all.to_vec())).await;
    let first = stage.request(&Request::get("/test/echo")).await;
    let token = first.header("x-session-token").unwrap().to_owned();
    assert_eq!((token.as_str(), first.echoed().header("x-session-token")), (stage.two.addr.to_string().as_str(), None));
    for token in [token, stage.one.addr.to_string()] {
        let next = stage.request(&Request::get("/test/echo").header("X-Session-Token", &token)).await;
        assert_eq!(next.served_by().map(|served| served.to_string()), Some(token.clone()));
        assert_eq!(next.echoed().header("x-session-token"), Some(token.as_str()));
        assert_eq!(next.header("x-session-token"), Some(token.as_str()));
        assert_eq!(
            header(&stage.epp.streams().last().unwrap().request_headers(), "x-session-token"),
            Some(token.as_str())
        );
    }
}
