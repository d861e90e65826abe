//! Third-party servers as endpoints on this machine. Origin servers run a script from `tests/local/servers`; proxies forward to a
//! [`ModelServer`]. `cargo xtask setup --tests` installs those the tests need, and `--posts` the rest.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{Alphabet, ModelServer, Process, eventually, model_server::Options};

/// Size of the smallest response that may be steered.
pub const CONTENT: usize = 200_000;
/// A JVM starts slowly on a busy machine.
const SOON: Duration = Duration::from_secs(40);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    Nginx,
    Uvicorn,
    UvicornAsyncio,
    Aiohttp,
    Gunicorn,
    Go,
    Node,
    JdkServer,
    JavaNio,
    Haproxy,
    Envoy,
    Penstock,
}

/// A running server, until dropped.
pub struct RealServer {
    pub kind: Kind,
    pub addr: SocketAddr,
    process: Process,
    _origin: Option<ModelServer>,
    _folder: TempDir,
}

impl RealServer {
    pub async fn start(kind: Kind) -> Result<Self> {
        let folder = TempDir::new()?;
        let mut origin = None;
        let upstream = if kind.is_proxy() {
            let options = Options { idle_close: None, keep_requests: false, keep_sent: false, ..Options::default() };
            origin.insert(ModelServer::start(options).await?).addr
        } else {
            SocketAddr::from(([127, 0, 0, 1], 0))
        };
        // Some servers do not report their port, so they get one that was free a moment ago.
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let command = kind.command(folder.path(), addr, upstream)?;
        let mut process = Process::spawn(command).context("run `cargo xtask setup --tests --posts`")?;
        let addr = if kind.says_where() { process.listening(SOON).await? } else { addr };
        eventually(SOON, || {
            assert!(process.rss().is_ok(), "{kind:?}: {:#?}", process.output());
            TcpStream::connect(addr).is_ok()
        })
        .await;
        Ok(Self { kind, addr, process, _origin: origin, _folder: folder })
    }

    /// Its output so far.
    pub fn output(&self) -> Vec<String> {
        self.process.output()
    }

    /// Where it accepts a POST and reports what arrived.
    pub fn target(&self) -> &'static str {
        if self.kind.is_proxy() { "/test/echo" } else { "/post" }
    }

    /// Where it sends at least [`CONTENT`] bytes, if it does.
    pub fn stream(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Gunicorn | Kind::JdkServer => None,
            kind if kind.is_proxy() => Some("/test/body"),
            _ => Some("/stream"),
        }
    }
}

impl Kind {
    fn is_proxy(self) -> bool {
        matches!(self, Self::Nginx | Self::Haproxy | Self::Envoy | Self::Penstock)
    }

    fn says_where(self) -> bool {
        !self.is_proxy() && self != Self::Gunicorn
    }

    fn command(self, folder: &Path, addr: SocketAddr, origin: SocketAddr) -> Result<Command> {
        let script = |program: &str, arguments: &[&str], name: &str| {
            let mut command = Command::new(program);
            command.args(arguments).arg(scripts().join(name)).arg(folder.join("content"));
            command
        };
        fs::write(folder.join("content"), Alphabet::Text.bytes(1, 0, CONTENT))?;
        let config = |name: &str, text: String| written(folder.join(name), &text);
        let python = venv("python").into_os_string().into_string();
        let python = &*python.ok().context("the path of the Python environment is not UTF-8")?;
        let short_java = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"];
        Ok(match self {
            Self::Nginx => {
                let mut command = Command::new("nginx");
                command.arg("-e").arg("stderr").arg("-c").arg(config("nginx.conf", nginx(folder, addr, origin))?);
                command
            }
            Self::Uvicorn | Self::UvicornAsyncio => {
                let mut command = script(python, &[], "asgi.py");
                command.arg(if self == Self::Uvicorn { "uvloop" } else { "asyncio" });
                command
            }
            Self::Aiohttp => script(python, &[], "aiohttp_server.py"),
            Self::Gunicorn => {
                let mut command = Command::new(python);
                command.args(["-m", "gunicorn", "--worker-class", "gthread", "--threads", "64"]);
                command.args(["--keep-alive", "30", "--bind", &addr.to_string(), "wsgi:app"]).current_dir(scripts());
                command.env("PYTHONDONTWRITEBYTECODE", "1");
                command
            }
            Self::Go => {
                let mut command = Command::new(go_server()?);
                command.arg(folder.join("content"));
                command
            }
            Self::Node => script("node", &[], "node.js"),
            Self::JdkServer => script("java", &short_java, "JdkServer.java"),
            Self::JavaNio => {
                let arguments = [&short_java[..], &["--add-opens", "java.base/sun.nio.ch=ALL-UNNAMED"]].concat();
                script("java", &arguments, "NioServer.java")
            }
            Self::Haproxy => {
                let mut command = Command::new("haproxy");
                command.arg("-f").arg(config("haproxy.cfg", haproxy(addr, origin))?);
                command
            }
            Self::Envoy => {
                let mut command = Command::new(venv("envoy"));
                command.args(["--concurrency", "2", "--disable-hot-restart", "--log-level", "error", "-c"]);
                command.arg(config("envoy.yaml", envoy(addr, origin))?);
                command
            }
            Self::Penstock => {
                let mut command = Command::new(Process::binary("penstock")?);
                command.arg("run").arg("--config").arg(config("penstock.toml", penstock(addr, origin))?);
                command
            }
        })
    }
}

fn written(path: PathBuf, text: &str) -> Result<PathBuf> {
    fs::write(&path, text)?;
    Ok(path)
}

fn penstock(addr: SocketAddr, origin: SocketAddr) -> String {
    format!(
        "[listen]\naddress = \"{addr}\"\n[admin]\naddress = \"127.0.0.1:0\"\n[limits]\nbody_bytes = {}\n\
         [[pools]]\nname = \"a\"\nendpoints = [\"{origin}\"]\n",
        64 << 20
    )
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

fn scripts() -> PathBuf {
    root().join("tests/tests/local/servers")
}

fn venv(program: &str) -> PathBuf {
    root().join("target/venv/bin").join(program)
}

/// Built by Go, usually from its cache. Another process may be running the previous build, and another test may be building.
pub fn go_server() -> Result<PathBuf> {
    let binary = root().join("target/go-server");
    let folder = tempfile::tempdir_in(root().join("target"))?;
    let fresh = folder.path().join("go-server");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&fresh).arg(scripts().join("server.go"));
    build.env("GO111MODULE", "off").env("CGO_ENABLED", "0").env("GOCACHE", root().join("target/go-cache"));
    let built = build.output().context("run `cargo xtask setup --tests`")?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    fs::rename(fresh, &binary)?;
    Ok(binary)
}

fn nginx(folder: &Path, addr: SocketAddr, origin: SocketAddr) -> String {
    let path = folder.display();
    format!(
        "daemon off; master_process off; pid {path}/pid; error_log stderr notice;\n\
         events {{ worker_connections 2000; }}\n\
         http {{ access_log off; client_max_body_size 64m; client_body_buffer_size 64k;\n\
         client_body_temp_path {path}/body; proxy_temp_path {path}/proxy; fastcgi_temp_path {path}/fastcgi;\n\
         uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;\n\
         server {{ listen {addr} backlog=512; location / {{ proxy_pass http://{origin}; proxy_http_version 1.1; }} }} }}\n"
    )
}

fn haproxy(addr: SocketAddr, origin: SocketAddr) -> String {
    format!(
        "defaults\n mode http\n timeout client 30s\n timeout server 30s\n timeout connect 5s\n option splice-auto\n\
         frontend in\n bind {addr}\n default_backend out\nbackend out\n server origin {origin}\n"
    )
}

fn envoy(addr: SocketAddr, origin: SocketAddr) -> String {
    let at = |address: SocketAddr| {
        format!("{{ socket_address: {{ address: {}, port_value: {} }} }}", address.ip(), address.port())
    };
    format!(
        "static_resources:\n\
         \x20 listeners:\n\
         \x20 - address: {}\n\
         \x20   filter_chains:\n\
         \x20   - filters:\n\
         \x20     - name: envoy.filters.network.http_connection_manager\n\
         \x20       typed_config:\n\
         \x20         \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n\
         \x20         stat_prefix: in\n\
         \x20         route_config: {{ virtual_hosts: [{{ name: a, domains: [\"*\"], routes: [{{ match: {{ prefix: / }}, route: {{ cluster: out, timeout: 60s }} }}] }}] }}\n\
         \x20         http_filters:\n\
         \x20         - name: envoy.filters.http.router\n\
         \x20           typed_config: {{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}\n\
         \x20 clusters:\n\
         \x20 - name: out\n\
         \x20   type: STATIC\n\
         \x20   load_assignment: {{ cluster_name: out, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {} }} }}] }}] }}\n",
        at(addr),
        at(origin)
    )
}
