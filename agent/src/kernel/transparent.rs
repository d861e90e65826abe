//! Tests that a server cannot observe the message program's map: compares the results of the same calls on a plain
//! connection and on one whose socket is in the map during responses, as `steer` does it.
//!
//! If the map is not observable on this kernel, also on a connection whose socket stays in the map, as for upgraded and
//! pinned connections.

mod calls;
mod uring;

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    rc::Rc,
    sync::Arc,
};

use socket2::{Domain, SockRef, Socket, Type};

use self::calls::Server;
use super::{Kernel, cgroup};
use crate::{
    selftest,
    steer::{Source, WorkerSteering},
};

/// Size of a request, in bytes.
const REQUEST: usize = 195;

/// When the server's socket is in the map.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mapped {
    Never,
    /// From a response's first byte to its last.
    Responses,
    Always,
}

/// A client's connection as the agent makes it, and the server's end of it.
struct Pair {
    client: TcpStream,
    server: Server,
    mapped: Mapped,
    source: Option<Source>,
}

impl Pair {
    fn new(steering: &Rc<WorkerSteering>, mapped: Mapped) -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        calls::fast_open(&listener);
        listener.listen(1).unwrap();
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let source = (mapped != Mapped::Never).then(|| steering.announce_source(&client).unwrap());
        client.connect(&listener.local_addr().unwrap()).unwrap();
        let server = Server::new(listener.accept().unwrap().0);
        if let Some(source) = &source {
            source.insert(&client).unwrap();
        }
        let client: TcpStream = client.into();
        client.set_nodelay(true).unwrap();
        client.set_read_timeout(Some(calls::PATIENCE)).unwrap();
        let pair = Self { client, server, mapped, source };
        if mapped == Mapped::Always {
            pair.admit();
        }
        pair
    }

    fn admit(&self) {
        if let Some(source) = &self.source {
            assert!(source.admit(), "the server's socket was not admitted");
        }
    }

    fn dismiss(&self) {
        if self.mapped == Mapped::Responses {
            assert!(self.source.as_ref().is_some_and(Source::dismiss), "the server's socket was not dismissed");
        }
    }

    fn send(&mut self, bytes: usize) {
        self.client.write_all(&calls::pattern(0, bytes)).unwrap();
        self.server.arrived(bytes);
    }

    /// Sends the server's answer with every sending call.
    fn respond(&mut self) {
        self.admit();
        self.server.look("before the response");
        let mut client = self.client.try_clone().unwrap();
        let (server, want) = (&mut self.server, calls::RESPONSE);
        let got = std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut got = vec![0; want];
                client.read_exact(&mut got).unwrap();
                got
            });
            server.respond();
            reader.join().unwrap()
        });
        assert!(got == calls::pattern(0, want), "{:?}: the response differs from what was sent", self.mapped);
        self.server.acknowledged();
        self.server.look("after the response");
        self.dismiss();
    }

    /// Records how the client sees the end.
    fn client_end(&mut self) {
        let mut byte = [0];
        let end = self.client.read(&mut byte).map_err(|error| error.kind());
        self.server.note(format!("the client reads {end:?}"));
    }
}

/// Reads requests with every reading call, with a response after each.
fn reads(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.look("a request");
    pair.server.receive(100, 0);
    pair.server.look("the rest of a request");
    pair.server.receive(100, 0);
    pair.respond();

    pair.send(REQUEST);
    pair.server.look("a second request");
    pair.server.receive(REQUEST, libc::MSG_PEEK);
    pair.server.receive(50, libc::MSG_TRUNC);
    pair.server.receive(REQUEST - 50, libc::MSG_WAITALL);
    pair.respond();

    for read in [Server::low_water, Server::many_messages, Server::splice_out, uring::receives] {
        pair.send(REQUEST);
        read(&mut pair.server, REQUEST);
        pair.respond();
    }
    pair.server.options();
    pair.server.passed_on();
}

/// The client closes its side while the server answers.
fn client_finishes(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.receive(REQUEST, 0);
    pair.admit();
    pair.client.shutdown(Shutdown::Write).unwrap();
    pair.server.ended();
    pair.server.look("the client's end");
    pair.server.receive(10, 0);
    pair.server.send(1000, 0);
    pair.client.read_exact(&mut [0; 1000]).unwrap();
    pair.server.close();
    pair.client_end();
}

/// The client resets while the server answers.
fn client_resets(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.receive(REQUEST, 0);
    pair.admit();
    SockRef::from(&pair.client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    let other = TcpStream::connect(std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    drop(std::mem::replace(&mut pair.client, other.unwrap()));
    pair.server.ended();
    pair.server.receive(10, 0);
    pair.server.receive(10, 0);
    pair.server.send(1000, libc::MSG_NOSIGNAL);
    pair.server.look("after a reset");
}

/// The server closes its sending side, reads what still arrives, then closes its receiving side.
fn server_shuts_down(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.receive(REQUEST, 0);
    pair.admit();
    pair.server.send(1000, 0);
    pair.server.shut_down(libc::SHUT_WR);
    pair.client.read_exact(&mut [0; 1000]).unwrap();
    pair.client_end();
    pair.server.send(10, libc::MSG_NOSIGNAL);
    pair.dismiss();
    pair.send(REQUEST);
    pair.server.look("after the server's end");
    pair.server.receive(REQUEST, 0);
    pair.server.shut_down(libc::SHUT_RD);
    pair.server.receive(REQUEST, 0);
    pair.server.look("both ends");
}

/// The server resets in the middle of a response.
fn server_lingers(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.receive(REQUEST, 0);
    pair.admit();
    SockRef::from(&pair.server.socket()).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    pair.server.close();
    pair.client_end();
}

/// The server closes with a request unread, so the client gets a reset.
fn server_closes_unread(pair: &mut Pair) {
    pair.send(REQUEST);
    pair.server.receive(REQUEST, 0);
    pair.respond();
    pair.send(REQUEST);
    pair.server.close();
    pair.client_end();
}

type Scenario = fn(&mut Pair);
const SCENARIOS: [(&str, Scenario); 6] = [
    ("reads", reads),
    ("client_finishes", client_finishes),
    ("client_resets", client_resets),
    ("server_shuts_down", server_shuts_down),
    ("server_lingers", server_lingers),
    ("server_closes_unread", server_closes_unread),
];

fn steering() -> (Rc<WorkerSteering>, bool) {
    let mut kernel = Kernel::load(64).expect("load");
    kernel.attach_local(&cgroup::root().expect("a cgroup v2 hierarchy")).expect("attach");
    let visible = selftest::how_visible(&mut kernel).expect("the calls can be tried").is_some();
    (WorkerSteering::new(&Arc::new(kernel)).expect("maps"), visible)
}

#[test]
fn endpoint_calls_return_the_same_inside_and_outside_the_map() {
    let (steering, visible) = steering();
    let ways: &[Mapped] = if visible { &[Mapped::Responses] } else { &[Mapped::Responses, Mapped::Always] };
    for (name, scenario) in SCENARIOS {
        let run = |mapped| {
            let mut pair = Pair::new(&steering, mapped);
            scenario(&mut pair);
            pair.server.take_log()
        };
        let plain = run(Mapped::Never);
        for &mapped in ways {
            let seen = run(mapped);
            for (plain, seen) in plain.iter().zip(&seen) {
                assert_eq!(plain, seen, "{name}, {mapped:?}");
            }
            assert_eq!(plain.len(), seen.len(), "{name}, {mapped:?}");
        }
        println!("{name}: {} calls compared, {ways:?}", plain.len());
    }
}

#[test]
fn endpoint_that_tracks_its_sends_is_not_admitted() {
    let (steering, _) = steering();
    for prepare in [calls::zerocopy as fn(&Server), calls::stamps] {
        let mut pair = Pair::new(&steering, Mapped::Responses);
        pair.send(REQUEST);
        pair.server.receive(REQUEST, 0);
        prepare(&pair.server);
        assert!(!pair.source.as_ref().unwrap().admit());
    }
}

/// On a socket in a map, `recv` in one thread fails with EAGAIN when another one waits for room to send.
#[test]
fn endpoint_whose_calls_block_is_admitted_only_if_asked() {
    let mut kernel = Kernel::load(64).expect("load");
    kernel.attach_local(&cgroup::root().expect("a cgroup v2 hierarchy")).expect("attach");
    let kernel = Arc::new(kernel);
    let steering = WorkerSteering::new(&kernel).expect("maps");
    for (asked, nonblocking, expected) in [(true, false, true), (false, false, false), (false, true, true)] {
        kernel.set_admits_blocking(asked);
        let mut pair = Pair::new(&steering, Mapped::Responses);
        pair.send(REQUEST);
        pair.server.receive(REQUEST, 0);
        calls::set_nonblocking(&pair.server, nonblocking);
        assert_eq!(pair.source.as_ref().unwrap().admit(), expected, "{asked} {nonblocking}");
    }
}

#[test]
fn endpoint_with_unread_request_is_not_admitted() {
    let (steering, _) = steering();
    let mut pair = Pair::new(&steering, Mapped::Responses);
    let source = |pair: &Pair| pair.source.as_ref().unwrap().admit();
    pair.send(REQUEST);
    assert!(!source(&pair), "nothing has been read");
    pair.server.receive(REQUEST - 1, 0);
    assert!(!source(&pair), "a byte is left");
    pair.server.receive(1, 0);
    assert!(source(&pair));
}
