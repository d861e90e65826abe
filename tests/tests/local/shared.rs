//! A sender that changes its pages after sending them (`sendfile` from tmpfs): in every mode, the client gets the same chunk
//! syntax that the agent parsed.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::FileExt as _,
    sync::Arc,
    time::Duration,
};

use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    sendfile::sendfile,
};
use parking_lot::Mutex;
use penstock_tests::{
    Alphabet, BodyEnd, Client, Request, TestAgent, agent::builtin_pool, eventually, posts::MODES, sender::set_zerocopy,
};
use socket2::{Domain, Socket, Type};

const SOON: Duration = Duration::from_secs(10);
/// More than the client's receive buffer, less than the agent's send buffer.
const QUEUED: usize = 300_000;
const TAIL: &[u8] = b"00005\r\nworld\r\n0\r\n\r\n";

fn read_request(connection: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match connection.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return false,
        }
    }
    true
}

/// Answers the first request with a chunk that the client leaves unread and a chunk from a file, and overwrites the file when the
/// next request arrives on any connection: by then the agent considers the message complete.
fn endpoint(zerocopy: bool) -> SocketAddr {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    if zerocopy {
        set_zerocopy(&listener).unwrap();
    }
    listener.listen(16).unwrap();
    let listener: std::net::TcpListener = listener.into();
    let addr = listener.local_addr().unwrap();
    let sent: Arc<Mutex<Option<File>>> = Arc::default();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().map_while(Result::ok) {
            let sent = Arc::clone(&sent);
            std::thread::spawn(move || {
                while read_request(&mut connection) {
                    if let Some(file) = sent.lock().take() {
                        file.write_all_at(b"000ff", 0).unwrap();
                        connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
                        continue;
                    }
                    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
                    connection.write_all(head.as_bytes()).unwrap();
                    connection.write_all(format!("{QUEUED:x}\r\n").as_bytes()).unwrap();
                    for at in (0..QUEUED).step_by(10_000) {
                        connection.write_all(&Alphabet::Text.bytes(1, at as u64, 10_000)).unwrap();
                    }
                    connection.write_all(b"\r\n").unwrap();
                    let mut file = File::from(memfd_create(c"tail", MFdFlags::MFD_CLOEXEC).unwrap());
                    file.write_all(TAIL).unwrap();
                    assert_eq!(sendfile(&connection, &file, Some(&mut 0), TAIL.len()), Ok(TAIL.len()));
                    *sent.lock() = Some(file);
                }
            });
        }
    });
    addr
}

#[tokio::test]
async fn chunk_syntax_rewritten_after_sending_does_not_reach_client() {
    for zerocopy in [false, true] {
        for mode in MODES {
            let agent = TestAgent::start(builtin_pool(&[endpoint(zerocopy)]), mode, |config| config.listen.workers = 1);
            let mut client = Client::connect_with(agent.addr, Some(4096)).await.unwrap();
            let done = || agent.count("penstock_requests_total", &[r#"reason="ok""#]);
            client.send(&Request::get("/a")).await.unwrap();
            let head = client.head().await.unwrap();
            assert_eq!(head.status, 200);
            eventually(SOON, || done() == 1).await;
            // The endpoint overwrites its file now.
            let mut other = Client::connect(agent.addr).await.unwrap();
            assert_eq!(other.request(&Request::get("/b")).await.unwrap().text(), "ok");
            let mut body = Vec::new();
            let read = client.read_body(penstock_tests::client::Pace::Fast, |bytes| {
                body.extend_from_slice(bytes);
                Ok(())
            });
            let read = tokio::time::timeout(SOON, read).await.expect("the body ends").unwrap();
            assert_eq!(read.end, BodyEnd::Complete, "{mode:?}, zerocopy {zerocopy}");
            assert!(body == [Alphabet::Text.bytes(1, 0, QUEUED), b"world".to_vec()].concat(), "{mode:?}");
            println!(
                "{mode:?}, zerocopy {zerocopy}: {} stops because of shared pages",
                agent.count("penstock_steer_stops_total", &[r#"reason="shared""#])
            );
        }
    }
}
