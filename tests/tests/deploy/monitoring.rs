//! The alerts and the dashboard, evaluated by a real Prometheus that scrapes an agent under load.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::Command,
    time::Duration,
};

use penstock_tests::{Client, ModelServer, Process, Request, agent_process::AgentProcess, model_server::Options};
use serde_json::Value;
use tempfile::TempDir;

use super::{read, root, run};

const ALERTS: &str = "deploy/helm/penstock/files/alerts.yaml";
const DASHBOARD: &str = "deploy/helm/penstock/files/dashboard.json";
/// Panels that have a value after any traffic at all.
const ALWAYS: [&str; 8] = [
    "Requests",
    "In progress",
    "Time to first token",
    "Picks by outcome",
    "Failures of the EPP",
    "Bytes of responses by path",
    "Endpoints by state",
    "Client connections",
];
const SOON: Duration = Duration::from_secs(30);

struct Prometheus {
    _process: Process,
    _folder: TempDir,
    addr: SocketAddr,
}

impl Prometheus {
    /// Scrapes `target` four times a second and evaluates the alerts as often.
    fn start(target: SocketAddr) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let addr =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr()).expect("a free port");
        let rules = root().join(ALERTS);
        let config = format!(
            "global: {{ scrape_interval: 250ms, scrape_timeout: 200ms, evaluation_interval: 250ms }}\n\
             rule_files: [{}]\n\
             scrape_configs: [{{ job_name: penstock, static_configs: [{{ targets: ['{target}'] }}] }}]\n",
            rules.display()
        );
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).expect("it can be written");
        let mut command = Command::new(root().join("target/prometheus/usr/bin/prometheus"));
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
        command.arg(format!("--web.listen-address={addr}"));
        let process = Process::spawn(command).expect("prometheus starts: run `cargo xtask setup --tests`");
        Self { _process: process, _folder: folder, addr }
    }

    async fn api(&self, request: Request) -> Option<Value> {
        let mut client = Client::connect(self.addr).await.ok()?;
        let answer: Value = client.request(&request).await.ok()?.json().ok()?;
        Some(answer)
    }

    async fn query(&self, expression: &str) -> Vec<Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let request = Request::post("/api/v1/query", format!("query={encoded}"))
            .header("content-type", "application/x-www-form-urlencoded");
        let answer = self.api(request).await.expect("Prometheus answers");
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().expect("a list").clone()
    }
}

/// A pool that works, and one that fails open because nothing listens at its EPP's address.
async fn agent(endpoint: SocketAddr) -> AgentProcess {
    let nothing =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr()).expect("an address");
    let text = format!(
        r#"
        listen.address = "127.0.0.1:0"
        admin.address = "127.0.0.1:0"
        [[pools]]
        name = "chat"
        endpoints = ["{endpoint}"]
        [[pools]]
        name = "open"
        endpoints = ["{endpoint}"]
        failure_mode = "open"
        picker = {{ kind = "epp", address = "{nothing}" }}
        [[routes]]
        headers = [{{ name = "x-pool", value = "open" }}]
        pool = "open"
        [[routes]]
        pool = "chat"
        "#
    );
    AgentProcess::start_with_text(&text).await.expect("the agent starts")
}

async fn load(addr: SocketAddr) {
    let chat = r#"{"model":"m","prompt":"p","stream":true,"max_tokens":4}"#;
    let mut client = Client::connect(addr).await.expect("the agent accepts");
    loop {
        for pool in ["chat", "open"] {
            let request = Request::post("/v1/completions", chat).header("content-type", "application/json");
            let response = client.request(&request.header("x-pool", pool)).await.expect("an answer");
            assert_eq!(response.status(), 200);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn prometheus_evaluates_every_alert_and_panel() {
    let options = Options { interval: Duration::from_millis(2), ..Options::default() };
    let server = ModelServer::start(options).await.expect("a model server");
    let agent = agent(server.addr).await;
    let traffic = tokio::spawn(load(agent.addr));
    let prometheus = Prometheus::start(agent.admin);

    let rules = evaluated_rules(&prometheus).await;
    assert!(rules.len() >= 10, "{rules:#?}");
    for rule in &rules {
        assert_eq!((&rule["health"], &rule["lastError"]), (&"ok".into(), &Value::Null), "{rule:#}");
    }
    for panel in dashboard_panels() {
        for target in panel["targets"].as_array().expect("targets") {
            let expression = target["expr"].as_str().expect("an expression");
            let expression =
                expression.replace("$__rate_interval", "5s").replace("$pool", ".*").replace("$instance", ".*");
            let found = prometheus.query(&expression).await;
            let title = panel["title"].as_str().expect("a title");
            assert!(!found.is_empty() || !ALWAYS.contains(&title), "{title} is empty: {expression}");
        }
    }
    // The condition of the alert that is true here.
    let open = rules.iter().find(|rule| rule["name"] == "PenstockFailsOpen").expect("the alert");
    let active = prometheus.query(open["query"].as_str().expect("a query")).await;
    assert_eq!(active.len(), 1, "{active:?}");
    assert_eq!(active[0]["metric"]["pool"], "open");
    assert!(!traffic.is_finished(), "{:?}", traffic.await);
}

/// The rules, once there are rates and all have been evaluated.
async fn evaluated_rules(prometheus: &Prometheus) -> Vec<Value> {
    let started = std::time::Instant::now();
    loop {
        assert!(started.elapsed() < SOON, "Prometheus has evaluated nothing");
        tokio::time::sleep(Duration::from_millis(250)).await;
        let Some(answer) = prometheus.api(Request::get("/api/v1/rules")).await else { continue };
        let Some(groups) = answer["data"]["groups"].as_array() else { continue };
        let rules: Vec<Value> =
            groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect();
        let rates = "rate(penstock_epp_exchange_seconds_count[5s]) > 0";
        let evaluated = rules.iter().all(|rule| rule["health"] != "unknown");
        if !rules.is_empty() && evaluated && !prometheus.query(rates).await.is_empty() {
            return rules;
        }
    }
}

fn dashboard_panels() -> Vec<Value> {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels").clone();
    panels.into_iter().filter(|panel| panel["type"] != "row").collect()
}

#[test]
fn panels_that_must_have_values_exist() {
    let titles: Vec<String> = dashboard_panels().iter().map(|panel| panel["title"].to_string()).collect();
    for title in ALWAYS {
        assert!(titles.contains(&format!("{title:?}")), "{title} in {titles:?}");
    }
}

/// Alerts and panels name only metrics that the reference has; a histogram has `_bucket`, `_count` and `_sum`.
#[test]
fn alerts_and_panels_name_documented_metrics() {
    let reference = read("docs/metrics.md");
    for text in [read(ALERTS), read(DASHBOARD)] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let metrics: Vec<&str> = words.filter(|word| word.starts_with("penstock_")).collect();
        assert!(metrics.len() > 10, "{metrics:?}");
        for metric in metrics {
            let family =
                ["_bucket", "_count", "_sum"].iter().find_map(|end| metric.strip_suffix(end)).unwrap_or(metric);
            assert!(reference.contains(&format!("`{family}`")), "{metric} is not in docs/metrics.md");
        }
    }
}

#[test]
fn promtool_accepts_the_alerts() {
    let checked = run("prometheus/usr/bin/promtool", &["check", "rules", ALERTS]).unwrap();
    assert!(checked.contains("SUCCESS"), "{checked}");
}
