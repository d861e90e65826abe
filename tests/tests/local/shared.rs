//! A sender that changes its pages after sending them (`sendfile` and `splice` from tmpfs, `vmsplice`): in every mode, the client gets
//! the same chunk syntax that the agent parsed.

use std::{
    fs::File,
    io::{IoSlice, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::FileExt as _,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{SpliceFFlags, splice, vmsplice},
    sys::{
        memfd::{MFdFlags, memfd_create},
        sendfile::sendfile,
    },
};
use parking_lot::Mutex;
use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Alphabet, BodyEnd, Client, Request, agent_process::AgentProcess, client::Pace, posts::MODES, sender::set_zerocopy,
    stress::mode_name,
};
use socket2::{Domain, Socket, Type};

const SOON: Duration = Duration::from_secs(10);
/// More than the client's receive buffer, less than the agent's send buffer.
const QUEUED: usize = 300_000;
const TAIL: &[u8] = b"00005\r\nworld\r\n0\r\n\r\n";
/// What the endpoint writes over the beginning of the tail.
const CHANGED: &[u8] = b"000ff";

/// How the endpoint sends pages that it can still change.
#[derive(Clone, Copy, Debug)]
enum Lending {
    SendFile,
    /// From a file through a pipe.
    Splice,
    /// From memory through a pipe.
    VmSplice,
}

/// The pages of the tail.
enum Lent {
    File(File),
    Memory(Vec<u8>),
}

impl Lending {
    fn send_tail(self, connection: &TcpStream) -> Lent {
        let (output, input) = std::io::pipe().unwrap();
        let none = SpliceFFlags::empty();
        let from_pipe = || assert_eq!(splice(&output, None, connection, None, TAIL.len(), none), Ok(TAIL.len()));
        if let Self::VmSplice = self {
            let memory = TAIL.to_vec();
            assert_eq!(vmsplice(&input, &[IoSlice::new(&memory)], none), Ok(TAIL.len()));
            from_pipe();
            return Lent::Memory(memory);
        }
        let mut file = File::from(memfd_create(c"tail", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(TAIL).unwrap();
        if let Self::SendFile = self {
            assert_eq!(sendfile(connection, &file, Some(&mut 0), TAIL.len()), Ok(TAIL.len()));
        } else {
            assert_eq!(splice(&file, Some(&mut 0), &input, None, TAIL.len(), none), Ok(TAIL.len()));
            from_pipe();
        }
        Lent::File(file)
    }
}

impl Lent {
    fn change(&mut self) {
        match self {
            Self::File(file) => file.write_all_at(CHANGED, 0).unwrap(),
            Self::Memory(memory) => memory[..CHANGED.len()].copy_from_slice(CHANGED),
        }
    }
}

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

/// The first response but for its tail: a chunk that the client leaves unread.
fn send_beginning(connection: &mut TcpStream) {
    connection.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    connection.write_all(format!("{QUEUED:x}\r\n").as_bytes()).unwrap();
    for at in (0..QUEUED).step_by(10_000) {
        connection.write_all(&Alphabet::Text.bytes(1, at as u64, 10_000)).unwrap();
    }
    connection.write_all(b"\r\n").unwrap();
}

/// Answers the first request with a long chunk and, once told, with a tail whose pages it can change. Changes them when the next
/// request arrives on any connection: by then the agent considers the message complete.
fn endpoint(lending: Lending, zerocopy: bool) -> (SocketAddr, mpsc::Sender<()>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    if zerocopy {
        set_zerocopy(&listener).unwrap();
    }
    listener.listen(16).unwrap();
    let listener: std::net::TcpListener = listener.into();
    let addr = listener.local_addr().unwrap();
    let (tell, told) = mpsc::channel();
    let (lent, told) = (Arc::<Mutex<Option<Lent>>>::default(), Arc::new(Mutex::new(told)));
    std::thread::spawn(move || {
        for mut connection in listener.incoming().map_while(Result::ok) {
            let (lent, told) = (Arc::clone(&lent), Arc::clone(&told));
            std::thread::spawn(move || {
                while read_request(&mut connection) {
                    if let Some(lent) = &mut *lent.lock() {
                        lent.change();
                        connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
                        continue;
                    }
                    send_beginning(&mut connection);
                    told.lock().recv().unwrap();
                    let mut lent = lent.lock();
                    *lent = Some(lending.send_tail(&connection));
                }
            });
        }
    });
    (addr, tell)
}

/// Returns once the agent has forwarded a whole response.
async fn until_answered(agent: &AgentProcess) {
    let begin = Instant::now();
    while agent.metric("penstock_requests_total", &[r#"reason="ok""#]).await.unwrap() == 0.0 {
        assert!(begin.elapsed() < SOON, "the response does not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Returns how often the agent took a flow back from the kernel because of shared pages.
async fn client_gets_what_was_parsed(mode: SteeringMode, lending: Lending, zerocopy: bool) -> f64 {
    let (endpoint, tell) = endpoint(lending, zerocopy);
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let agent = AgentProcess::start(local, endpoint, &mode_name(mode), "").await.unwrap();
    let mut client = Client::connect_with(agent.addr, Some(4096)).await.unwrap();
    client.send(&Request::get("/a")).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    // By then the kernel has the flow.
    agent.until_idle().await.unwrap();
    tell.send(()).unwrap();
    until_answered(&agent).await;
    // The endpoint changes the tail now.
    let mut other = Client::connect(agent.addr).await.unwrap();
    assert_eq!(other.request(&Request::get("/b")).await.unwrap().text(), "ok");
    let mut body = Vec::new();
    let read = client.read_body(Pace::Fast, |bytes| {
        body.extend_from_slice(bytes);
        Ok(())
    });
    let read = tokio::time::timeout(SOON, read).await.expect("the body ends").unwrap();
    assert_eq!(read.end, BodyEnd::Complete, "{mode:?}, {lending:?}, zerocopy {zerocopy}");
    assert!(body == [Alphabet::Text.bytes(1, 0, QUEUED), b"world".to_vec()].concat(), "{mode:?}, {lending:?}");
    agent.metric("penstock_steer_stops_total", &[r#"reason="shared""#]).await.unwrap()
}

#[tokio::test]
async fn chunk_syntax_rewritten_after_sending_does_not_reach_client() {
    let rows =
        [(Lending::SendFile, false), (Lending::SendFile, true), (Lending::Splice, false), (Lending::VmSplice, false)];
    for (lending, zerocopy) in rows {
        for mode in MODES {
            let stops = client_gets_what_was_parsed(mode, lending, zerocopy).await;
            println!("{mode:?}, {lending:?}, zerocopy {zerocopy}: {stops} stops because of shared pages");
            assert!(stops > 0.0 || mode != SteeringMode::Ingress, "{lending:?}, zerocopy {zerocopy}");
        }
    }
}
