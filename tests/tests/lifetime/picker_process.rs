//! `penstock epp` as a process: its command line, and what happens when it runs out of descriptors.

use std::{
    net::{SocketAddr, TcpListener},
    process::{Command, Output},
    time::{Duration, Instant},
};

use penstock_tests::Process;
use tokio::{io::AsyncReadExt as _, net::TcpStream};

use crate::SOON;

const ENDPOINT: [&str; 2] = ["--endpoint", "10.0.0.1:8000"];

fn epp(through: &[&str], arguments: &[&str]) -> Command {
    let binary = Process::binary("penstock").unwrap();
    let mut words = through.iter().map(Into::into).chain([binary.into_os_string()]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg("epp").args(ENDPOINT).args(arguments);
    command
}

/// Silent clients take every descriptor: further ones are closed, no core spins, and those that go make room.
#[tokio::test]
async fn exhausted_descriptors_close_new_connections_without_spinning() {
    let command =
        epp(&["prlimit", "--nofile=64:64"], &["--listen", "127.0.0.1:0", "--tls", "off", "--log-format", "json"]);
    let mut process = Process::spawn(command).unwrap();
    let line = process.line("penstock epp started", SOON).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let address: SocketAddr = line["address"].as_str().unwrap().parse().unwrap();
    let mut held = Vec::new();
    for _ in 0..80 {
        held.push(TcpStream::connect(address).await.unwrap());
    }
    let line = process.line("descriptors", SOON).await.unwrap();
    assert!(line.contains("refused"), "{line}");
    // The last of them was accepted after the descriptors had run out.
    let mut last = held.pop().unwrap();
    let end = tokio::time::timeout(SOON, last.read(&mut [0; 1])).await.expect("the connection stays open");
    assert_eq!(end.unwrap_or(0), 0);
    let (before, begin) = (process.cpu_time().unwrap(), Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let busy = process.cpu_time().unwrap() - before;
    assert!(busy < begin.elapsed() / 10, "{busy:?} of CPU time");
    drop(held);
    let begin = Instant::now();
    loop {
        let mut client = TcpStream::connect(address).await.unwrap();
        if tokio::time::timeout(Duration::from_millis(500), client.read(&mut [0; 1])).await.is_err() {
            break;
        }
        assert!(begin.elapsed() < SOON, "connections are still closed");
    }
}

fn assert_refused(arguments: &[&str], code: i32, expected: &[&str]) {
    let Output { status, stderr, .. } = epp(&["timeout", "20"], arguments).output().unwrap();
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{arguments:?}: {text}");
    for expected in expected {
        assert!(text.contains(expected), "{arguments:?}: {expected} is missing in: {text}");
    }
}

#[test]
fn wrong_argument_is_named_with_what_was_expected() {
    for limit in ["--max-connections", "--max-streams", "--max-held", "--max-body", "--max-inflight"] {
        assert_refused(&[limit, "0"], 64, &[limit, "0"]);
    }
    assert_refused(&ENDPOINT, 1, &["--endpoint 10.0.0.1:8000", "expected each endpoint once"]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    assert_refused(&["--listen", &address], 1, &[&address, "in use"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.pem");
    let name = file.to_str().unwrap();
    assert_refused(&["--client-ca", name], 1, &[name, "No such file"]);
    std::fs::write(&file, "no certificate\n").unwrap();
    assert_refused(&["--client-ca", name], 1, &[name, "expected one or more certificates"]);
}
