//! Third-party servers as endpoints on this machine: a whole response and a stream of each arrive byte for byte, partly by the
//! path `local`. `cargo xtask setup --tests` installs the servers.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, BodyEnd, Checker, Client, Process, Reader, Request, TestAgent, agent::builtin_pool, eventually,
};
use tempfile::TempDir;

use crate::carried;

const SOON: Duration = Duration::from_secs(20);
pub(crate) const STREAM_ID: u64 = 11;
pub(crate) const SIZE: usize = 2_000_000;

/// The bytes that every server serves, in this test's folder.
pub(crate) fn content() -> TempDir {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("content"), Alphabet::Text.bytes(STREAM_ID, 0, SIZE)).unwrap();
    folder
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub(crate) fn script(name: &str) -> PathBuf {
    root().join("tests/tests/local/servers").join(name)
}

pub(crate) fn python() -> PathBuf {
    let python = root().join("target/venv/bin/python");
    assert!(python.is_file(), "no {}: run `cargo xtask setup --tests`", python.display());
    python
}

/// Runs a server, which gets the file and prints its address.
async fn start(mut command: Command, folder: &TempDir) -> (Process, SocketAddr) {
    command.arg(folder.path().join("content"));
    let mut process = Process::spawn(command).expect("run `cargo xtask setup --tests`");
    let addr = process.listening(SOON).await.unwrap();
    (process, addr)
}

/// Requests each path at every client speed concurrently, twice per connection.
async fn check_server(name: &str, addr: SocketAddr, paths: &[&'static str]) {
    let agent = TestAgent::start(builtin_pool(&[addr]), SteeringMode::Local, |_| {});
    let readers = [
        (Reader::Fast, None),
        (Reader::Slow { bytes: 32 << 10, tick: Duration::from_millis(1) }, Some(16 << 10)),
        (Reader::Stalled { after: 100_000, pause: Duration::from_millis(200) }, Some(16 << 10)),
    ];
    let begin = Instant::now();
    let mut clients = Vec::new();
    for path in paths {
        for (reader, rcvbuf) in readers {
            let (path, addr) = (*path, agent.addr);
            clients.push(tokio::spawn(async move {
                let mut client = Client::connect_with(addr, rcvbuf).await.unwrap();
                for _ in 0..2 {
                    client.send(&Request::get(path)).await.unwrap();
                    let head = client.head().await.unwrap_or_else(|error| panic!("{error:#}: {path} {reader:?}"));
                    assert_eq!(head.status, 200, "{path} {head:?}");
                    let read = reader.take(&mut client, &mut Checker::text(STREAM_ID)).await;
                    let read = read.unwrap_or_else(|error| panic!("{error:#}: {path} {reader:?}"));
                    assert_eq!((read.end, read.len), (BodyEnd::Complete, SIZE as u64), "{path} {reader:?}");
                }
            }));
        }
    }
    for client in clients {
        client.await.unwrap();
    }
    eventually(SOON, || carried(&agent, "local") > 0).await;
    println!(
        "{name}: {} bytes local, {} relayed, {:.1} s",
        carried(&agent, "local"),
        carried(&agent, "relay"),
        begin.elapsed().as_secs_f32()
    );
}

#[tokio::test]
async fn uvicorn_responses_are_exact() {
    let folder = content();
    let mut command = Command::new(python());
    command.arg(script("asgi.py"));
    let (_server, addr) = start(command, &folder).await;
    check_server("uvicorn", addr, &["/bulk", "/stream"]).await;
}

#[tokio::test]
async fn aiohttp_responses_are_exact() {
    let folder = content();
    let mut command = Command::new(python());
    command.arg(script("aiohttp_server.py"));
    let (_server, addr) = start(command, &folder).await;
    check_server("aiohttp", addr, &["/bulk", "/stream", "/file"]).await;
}

#[tokio::test]
async fn node_responses_are_exact() {
    let folder = content();
    let mut command = Command::new("node");
    command.arg(script("node.js"));
    let (_server, addr) = start(command, &folder).await;
    check_server("node", addr, &["/bulk", "/stream", "/file"]).await;
}

#[tokio::test]
async fn go_responses_are_exact() {
    let folder = content();
    let binary = penstock_tests::servers::go_server().unwrap();
    let (_server, addr) = start(Command::new(binary), &folder).await;
    check_server("go", addr, &["/bulk", "/stream", "/file"]).await;
}

/// A file by `sendfile`, by `writev`, at a limited rate, and in chunks (which nginx uses for a file it scans for includes).
#[tokio::test]
async fn nginx_responses_are_exact() {
    let folder = content();
    // nginx does not report its port, so it gets one that was free a moment ago.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let path = folder.path().display();
    let locations: String = [
        ("/sendfile", "sendfile on;"),
        ("/writev", "sendfile off;"),
        ("/limited", "sendfile on; limit_rate 3m;"),
        ("/limited-writev", "sendfile off; limit_rate 3m;"),
        ("/chunked", "sendfile off; ssi on; ssi_types *; limit_rate 3m;"),
    ]
    .map(|(name, settings)| format!("location = {name} {{ alias {path}/content; {settings} }}\n"))
    .concat();
    let config = format!(
        "daemon off; master_process off; pid {path}/pid; error_log stderr notice;\n\
         events {{ worker_connections 100; }}\n\
         http {{ access_log off; default_type application/octet-stream;\n\
         client_body_temp_path {path}/body; proxy_temp_path {path}/proxy; fastcgi_temp_path {path}/fastcgi;\n\
         uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;\n\
         server {{ listen {addr};\n{locations} }} }}\n"
    );
    let file = folder.path().join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-e").arg("stderr").arg("-c").arg(file);
    let server = Process::spawn(command).expect("run `cargo xtask setup --tests`");
    eventually(SOON, || {
        assert!(server.rss().is_ok(), "{:#?}", server.output());
        TcpStream::connect(addr).is_ok()
    })
    .await;
    check_server("nginx", addr, &["/sendfile", "/writev", "/limited", "/limited-writev", "/chunked"]).await;
}
