//! Takeovers with a scripted agent on one side.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::{io::IoSlice, os::fd::AsRawFd as _};

use super::{Scene, begin, ends_well, is_served, load::queue};
use crate::SOON;

/// The lines that an agent answers.
fn ask(path: &Path, line: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(line.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn line(stream: &mut UnixStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// The tests are root's, and the agent is not: the kernel lets root connect.
#[tokio::test]
async fn process_of_another_user_is_refused_by_name() {
    let scene = Scene::new().await;
    let agent = scene.agent(1, "off").await;
    let path = scene.socket();
    let answer = tokio::task::spawn_blocking(move || ask(&path, "penstock-takeover 1 9.9.9\n")).await.unwrap();
    assert_eq!(answer, "refused the running agent runs as uid 65534, and this one as uid 0\n");
    is_served(&agent).await;
    // The new agent checks, too.
    let mut new = begin(&scene.text(1, "off", "").replace("[process]\n", "[process]\nuser = \"keep\"\n"));
    new.line("cannot ask for the sockets of the running agent", SOON).await.unwrap();
    assert_eq!(new.ended(SOON).await.unwrap().code(), Some(1));
    is_served(&agent).await;
}

/// An agent of the tests' user.
fn own(scene: &Scene, workers: usize) -> String {
    scene.text(workers, "off", "").replace("[process]\n", "[process]\nuser = \"keep\"\n")
}

#[tokio::test]
async fn other_versions_and_strangers_are_refused() {
    let scene = Scene::new().await;
    let mut agent = penstock_tests::agent_process::AgentProcess::start_logging(&own(&scene, 1)).await.unwrap();
    scene.is_answered_by(&agent).await;
    let path = scene.socket();
    let answers = tokio::task::spawn_blocking(move || {
        ["penstock-takeover 2 9.9.9\n", "GET / HTTP/1.1\r\n", "done\n"].map(|line| ask(&path, line))
    });
    let [version, http, early] = answers.await.unwrap();
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(
        version,
        format!(
            "refused the running agent ({own}) speaks version 1 of the takeover protocol, the new one (9.9.9) version 2: stop the \
             running agent before you start this one\n"
        )
    );
    assert_eq!((http.as_str(), early.as_str()), ("", "refused expected penstock-takeover, found done\n"));
    agent.process.line("speaks version 1 of the takeover protocol", SOON).await.unwrap();
    is_served(&agent).await;
}

/// An agent cannot take over from the one at its socket, which answers like this, and says why.
async fn new_agent_says(scene: &Scene, answer: &'static str, said: &str) {
    let listener = UnixListener::bind(scene.socket()).unwrap();
    let old = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert!(line(&mut stream).starts_with("penstock-takeover 1 "));
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let mut new = begin(&own(scene, 1));
    new.line(said, SOON).await.unwrap();
    assert_eq!(new.ended(SOON).await.unwrap().code(), Some(1), "{answer}");
    old.join().unwrap();
    std::fs::remove_file(scene.socket()).unwrap();
}

#[tokio::test]
async fn new_agent_names_what_was_wrong_with_the_answer() {
    let scene = Scene::new().await;
    let cases = [
        ("refused the running agent (0.0.1) speaks version 0\n", "the running agent (0.0.1) speaks version 0"),
        ("hello\n", "an unknown message, \"hello\""),
        ("sockets 1 0.0.1\n", "the end of the connection"),
        ("sockets 1 0.0.1\nsocket listen own 127.0.0.1:1\n", "sent 0 descriptors, expected 1"),
        ("done\n", "expected `sockets`, found `done`"),
    ];
    for (answer, said) in cases {
        new_agent_says(&scene, answer, said).await;
    }
}

/// Connections that wait in the queues of the old agent's sockets, of which there are more or fewer than workers, are answered, also if
/// the old agent dies in between.
#[tokio::test]
async fn waiting_connections_are_answered_by_the_new_agent() {
    for (sockets, workers, dies) in [(3, 1, false), (1, 3, false), (4, 3, false), (2, 2, true)] {
        let scene = Scene::new().await;
        let bind = |address| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.bind(&std::net::SocketAddr::into(address)).unwrap();
            socket.listen(1024).unwrap();
            std::net::TcpListener::from(socket)
        };
        let first = bind(crate::ANY_PORT);
        let address = first.local_addr().unwrap();
        let passed: Vec<_> = std::iter::once(first).chain((1..sockets).map(|_| bind(address))).collect();
        let queued = queue(address, 40).await;
        let listener = UnixListener::bind(scene.socket()).unwrap();
        let old = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            line(&mut stream);
            writeln!(stream, "sockets {} 0.0.1", passed.len()).unwrap();
            for socket in &passed {
                let text = format!("socket listen own {address}\n");
                let fds = [socket.as_raw_fd()];
                let parts = [IoSlice::new(text.as_bytes())];
                let control = [ControlMessage::ScmRights(&fds)];
                sendmsg::<()>(stream.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
            }
            if !dies {
                assert_eq!(line(&mut stream), "ready listen");
                writeln!(stream, "done").unwrap();
            }
        });
        let new = penstock_tests::agent_process::AgentProcess::start_logging(&own(&scene, workers)).await.unwrap();
        assert_eq!(new.addr, address);
        for mut client in queued {
            assert_eq!(client.response().await.unwrap().status(), 200, "{sockets} {workers}");
        }
        is_served(&new).await;
        old.join().unwrap();
        new.process.terminate().unwrap();
        ends_well(new).await;
    }
}

/// A new agent that takes the sockets and vanishes, at every step before it is ready.
#[tokio::test]
async fn vanished_new_agent_changes_nothing() {
    let scene = Scene::new().await;
    let agent = penstock_tests::agent_process::AgentProcess::start_logging(&own(&scene, 2)).await.unwrap();
    scene.is_answered_by(&agent).await;
    for read in [0, 1, 100, 100_000] {
        let path = scene.socket();
        let vanish = move || {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            stream.write_all(b"penstock-takeover 1 9.9.9\n").unwrap();
            let mut total = 0;
            while total < read
                && let Ok(more) = stream.read(&mut vec![0; read - total])
                && more > 0
            {
                total += more;
            }
        };
        tokio::task::spawn_blocking(vanish).await.unwrap();
        is_served(&agent).await;
    }
}
