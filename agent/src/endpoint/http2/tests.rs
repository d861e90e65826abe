//! Tests of HTTP/2 connections to endpoints.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
};

use super::*;

const SETTINGS: u8 = 4;
const PING: u8 = 6;
const HEADERS: u8 = 1;
const PREFACE: usize = 24;

/// Accepts one connection, sends SETTINGS and nothing else. Returns the kinds of all frames received, at the end.
fn silent(listener: &TcpListener) -> Vec<u8> {
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).expect("SETTINGS");
    let mut bytes = Vec::new();
    // A reset ends the connection as well.
    let _ = stream.read_to_end(&mut bytes);
    let (mut kinds, mut rest) = (Vec::new(), &bytes[PREFACE.min(bytes.len())..]);
    while let [a, b, c, kind, ..] = *rest {
        kinds.push(kind);
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        rest = &rest[(9 + length).min(rest.len())..];
    }
    kinds
}

/// The paused clock advances whenever the runtime is idle.
#[tokio::test(start_paused = true)]
async fn silent_endpoint_gets_no_ping() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = std::thread::spawn(move || silent(&listener));
    let local = tokio::task::LocalSet::new();
    let times = ConnectionTimeouts { keep_alive: Duration::MAX, connect: None, unreachable: None };
    local
        .run_until(async {
            let mut stream =
                Http2Pool::new(times, HeadLimits { bytes: 1000, headers: 10 }).stream(address).await.expect("a stream");
            let request = http::Request::get("http://a/").body(()).expect("a request");
            let (response, ..) = stream.open(request, true).expect("the stream is opened");
            assert!(tokio::time::timeout(Duration::from_secs(3600), response).await.is_err());
        })
        .await;
    drop(local);
    let kinds = server.join().expect("a server");
    assert!(kinds.contains(&HEADERS), "{kinds:?}");
    assert!(!kinds.contains(&PING), "{kinds:?}");
}
