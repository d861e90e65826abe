//! Route selection: by head, by the model in the body, and by weight.

use std::net::SocketAddr;

use penstock_agent::config::{Config, FailureMode, SteeringMode};
use penstock_tests::{
    Client, ModelServer, Request, ScriptedEpp,
    agent::{TestAgent, builtin_pool, epp_pool},
    content::Alphabet,
    eventually,
    scripted_epp::{Endpoints, Production},
    stage::{echo, json},
};

use crate::SOON;

/// An agent with a pool for each of `names`, each with its own server, and the further configuration `text`.
struct Pools {
    agent: TestAgent,
    client: Client,
    names: &'static [&'static str],
    servers: Vec<ModelServer>,
}

async fn servers(count: usize) -> Vec<ModelServer> {
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(ModelServer::start(Default::default()).await.unwrap());
    }
    servers
}

impl Pools {
    async fn new(names: &'static [&'static str], text: &str) -> Self {
        let servers = servers(names.len()).await;
        let pools = names
            .iter()
            .zip(&servers)
            .map(|(name, server)| format!("[[pools]]\nname = \"{name}\"\nendpoints = [\"{}\"]\n", server.addr));
        let text = format!("{}{text}", pools.collect::<String>());
        let Config { pools, routes, bbr, .. } = Config::parse(&text, "test.toml").unwrap();
        let agent = TestAgent::start(builtin_pool(&[]), SteeringMode::Off, |config| {
            (config.pools, config.routes, config.bbr) = (pools, routes, bbr);
        });
        let client = Client::connect(agent.addr).await.unwrap();
        Self { agent, client, names, servers }
    }

    /// The pool that answered, or the code of the error.
    async fn ask(&mut self, request: &Request) -> String {
        let response = self.client.request(request).await.unwrap();
        let Some(served) = response.served_by() else {
            // The agent closes after its own error to a request without a pool.
            self.client = Client::connect(self.agent.addr).await.unwrap();
            return response.error_code();
        };
        assert_eq!(response.status(), 200);
        let server = self.servers.iter().position(|server| server.addr == served).unwrap();
        self.names[server].to_owned()
    }

    async fn answers(&mut self, rows: &[(Request, &str)]) {
        for (request, expected) in rows {
            assert_eq!(self.ask(request).await, *expected, "{request:?}");
        }
    }
}

fn get(path: &str) -> Request {
    Request::get(path)
}

fn named(model: &str) -> Request {
    echo(json(model, 10))
}

#[tokio::test]
async fn route_matches_host_path_method_and_header() {
    let routes = r#"
        [[routes]]
        host = ["*.models.example", "llm.example"]
        pool = "host"
        [[routes]]
        path = "/test/echo"
        method = ["GET", "HEAD"]
        headers = [{ name = "x-team", value = "red" }, { name = "x-beta" }]
        pool = "headers"
        [[routes]]
        path = "/test/echo"
        method = "GET"
        pool = "method"
        [[routes]]
        path_prefix = "/test"
        pool = "prefix"
    "#;
    let mut pools = Pools::new(&["host", "headers", "method", "prefix"], routes).await;
    let here = "/test/echo";
    pools
        .answers(&[
            (get(here).header("host", "a.b.Models.example:8080"), "host"),
            (get(here).header("host", "LLM.example"), "host"),
            (get(here).header("host", "models.example"), "method"),
            (get("http://x.models.example/test/echo"), "host_mismatch"),
            (get("http://x.models.example/test/echo").header("host", "x.models.example"), "host"),
            (get(here).header("x-team", "red").header("x-beta", ""), "headers"),
            (get(here).header("x-team", "blue").header("x-team", "red").header("x-beta", "1"), "headers"),
            (get(here).header("x-team", "red"), "method"),
            (get("/test/echo?x=/y"), "method"),
            (named("m"), "prefix"),
            (Request::post("/v1/completions", "{}"), "no_route"),
            (get("/tests"), "no_route"),
        ])
        .await;
    let refused = || pools.agent.count("penstock_requests_total", &[r#"pool="""#, r#"reason="no_route""#]);
    eventually(SOON, || refused() == 2).await;
}

/// Clients cannot meet conditions on control headers.
#[tokio::test]
async fn model_route_ignores_client_headers() {
    let routes = r#"
        [bbr.base_models]
        sql = "llama"
        [[routes]]
        headers = [{ name = "X-Gateway-Model-Name", value = "sql" }]
        pool = "sql"
        [[routes]]
        base_model = "llama"
        pool = "llama"
        [[routes]]
        model = ["mistral-*"]
        pool = "mistral"
        [[routes]]
        pool = "rest"
    "#;
    let mut pools = Pools::new(&["sql", "llama", "mistral", "rest"], routes).await;
    let posing = |request: Request| {
        ["x-gateway-model-name", "X_Gateway_Model_Name", "x-gateway-base-model-name", "X_Gateway_Base_Model_Name"]
            .iter()
            .fold(request, |request, name| request.header(name, if name.len() > 20 { "llama" } else { "sql" }))
    };
    pools
        .answers(&[
            (named("sql"), "sql"),
            (named("llama"), "llama"),
            (named("mistral-7b"), "mistral"),
            (named("mistral"), "rest"),
            (posing(named("mistral-7b")), "mistral"),
            (posing(named("other")), "rest"),
            (posing(get("/test/echo")), "rest"),
            // Declared as other than JSON.
            (Request::post("/test/echo", json("sql", 10)).header("content-type", "text/plain"), "rest"),
            (Request::post("/test/echo", json("sql", 10)), "rest"),
        ])
        .await;
}

/// A body that decides the route is read as far as needed; another is not awaited.
#[tokio::test]
async fn body_is_awaited_only_if_it_decides_route() {
    let servers = servers(2).await;
    let addrs = [servers[0].addr, servers[1].addr];
    let (first, second) = (start_epp(&addrs[..1]).await, start_epp(&addrs[1..]).await);
    let agent = TestAgent::start(epp_pool(&addrs[..1], first.addr, FailureMode::Closed), SteeringMode::Off, |config| {
        config.pools.push(epp_pool(&addrs[1..], second.addr, FailureMode::Closed));
        config.pools[1].name = "late".to_owned();
        let text = "[[pools]]\nname = \"default\"\nendpoints = [\"10.0.0.1:1\"]\n[[pools]]\nname = \"late\"\n\
                    endpoints = [\"10.0.0.1:1\"]\n[[routes]]\nhost = \"fixed\"\npool = \"default\"\n\
                    [[routes]]\nmodel = \"late\"\npool = \"late\"\n";
        config.routes = Config::parse(text, "test.toml").unwrap().routes;
    });
    let prompt = String::from_utf8(Alphabet::Text.bytes(2, 0, 300_000)).unwrap();
    let request = echo(format!(r#"{{"prompt":"{prompt}","model":"late"}}"#));
    for (host, asked, served) in [("fixed", 1, addrs[0]), ("any", 0, addrs[1])] {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let wire = request.clone().header("host", host).wire(host);
        let (begin, rest) = wire.split_at(250_000);
        client.send_raw(begin).await.unwrap();
        let told = || first.streams_started() + second.streams_started();
        if asked > 0 {
            eventually(SOON, || told() == 1).await;
        }
        let before = told();
        client.send_raw(rest).await.unwrap();
        let response = client.response().await.unwrap();
        assert_eq!(
            (response.served_by(), response.echoed().header("x-gateway-model-name")),
            (Some(served), Some("late"))
        );
        assert_eq!(told() - before, 1 - asked, "{host}");
    }
}

async fn start_epp(endpoints: &[SocketAddr]) -> ScriptedEpp {
    ScriptedEpp::start(Production::over(Endpoints::new(endpoints))).await.unwrap()
}

/// E24, `GatewayWeightedAcrossTwoInferencePools`: 70 to 30 of 200 requests, within a tenth or 4.5 standard deviations; each pool
/// asks its own EPP.
#[tokio::test]
async fn weighted_split_uses_picker_of_each_pool() {
    const REQUESTS: usize = 200;
    const SHARE: f64 = 0.7;
    let servers = servers(4).await;
    let addrs: Vec<SocketAddr> = servers.iter().map(|server| server.addr).collect();
    let (heavy, light) = (start_epp(&addrs[..2]).await, start_epp(&addrs[2..]).await);
    let agent = TestAgent::start(epp_pool(&addrs[..2], heavy.addr, FailureMode::Closed), SteeringMode::Off, |config| {
        config.pools.push(epp_pool(&addrs[2..], light.addr, FailureMode::Closed));
        config.pools[1].name = "light".to_owned();
        let text = "[[pools]]\nname = \"default\"\nendpoints = [\"10.0.0.1:1\"]\n[[pools]]\nname = \"light\"\n\
                    endpoints = [\"10.0.0.1:1\"]\n[[routes]]\nhost = \"primary.example.com\"\npath_prefix = \"/\"\n\
                    pools = [{ name = \"default\", weight = 70 }, { name = \"light\", weight = 30 }]\n";
        config.routes = Config::parse(text, "test.toml").unwrap().routes;
    });
    let request = named("m").header("host", "primary.example.com");
    let some = async || {
        let mut client = Client::connect(agent.addr).await.unwrap();
        let mut served = Vec::new();
        for _ in 0..REQUESTS / 10 {
            let response = client.request(&request).await.unwrap();
            assert_eq!(response.status(), 200, "{}", response.text());
            served.push(response.served_by().unwrap());
        }
        served
    };
    let served = futures_util::future::join_all((0..10).map(|_| some())).await.concat();
    let count = |addrs: &[SocketAddr]| served.iter().filter(|served| addrs.contains(served)).count();
    let (to_heavy, to_light) = (count(&addrs[..2]), count(&addrs[2..]));
    assert_eq!(to_heavy + to_light, REQUESTS);
    let tolerance = (4.5 * (SHARE * (1.0 - SHARE) / REQUESTS as f64).sqrt()).max(0.10);
    let share = to_heavy as f64 / REQUESTS as f64;
    assert!((share - SHARE).abs() <= tolerance, "{share} is not within {tolerance} of {SHARE}");
    // Each pool's picks come from its own picker, and there are no more picks than requests.
    assert_eq!((heavy.streams_started(), light.streams_started()), (to_heavy, to_light));
    assert!(addrs.iter().all(|addr| count(&[*addr]) > 0), "a picker did not rotate");
    for (pool, requests) in [("default", to_heavy), ("light", to_light)] {
        // A request is counted after its response is sent.
        let counted = || agent.count("penstock_requests_total", &[&format!("pool=\"{pool}\"")]);
        eventually(SOON, || counted() == requests as u64).await;
    }
}

/// E24: a list from one pool's picker does not continue in another pool.
#[tokio::test]
async fn failed_pool_does_not_use_other_pool() {
    let servers = servers(2).await;
    let addrs = [servers[0].addr, servers[1].addr];
    // From the wrong pool.
    let epp = start_epp(&addrs[1..]).await;
    let agent = TestAgent::start(epp_pool(&addrs[..1], epp.addr, FailureMode::Closed), SteeringMode::Off, |config| {
        config.pools.push(builtin_pool(&addrs[1..]));
        config.pools[1].name = "other".to_owned();
    });
    let response = Client::connect(agent.addr).await.unwrap().request(&named("m")).await.unwrap();
    assert_eq!((response.status(), response.error_code().as_str()), (502, "endpoint_not_in_pool"));
    assert_eq!((servers[0].requests(), servers[1].requests()), (0, 0));
}
