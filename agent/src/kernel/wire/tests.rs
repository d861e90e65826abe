//! Flows of path `wire` between three network namespaces, every byte compared by position.

mod adoption;
mod net;
mod paths;
mod scene;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::Shutdown,
    os::fd::AsFd as _,
    thread::scope,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use penstock_common::{
    tail::TAIL,
    wire::{
        flow::{mark, state},
        judge::refusal,
    },
};

use self::{
    net::{Family, TO_CLIENT},
    scene::{Joined, Scene, byte, read, relay},
};
use super::{Unfit, WireError};
use crate::kernel::socket;

const BOTH: [Family; 2] = [Family::Four, Family::Six];
const MIB: usize = 1 << 20;

/// Sends `len` bytes and FIN while the client reads, then lets the client close.
fn finish(scene: &Scene, joined: Joined, len: usize) {
    let Joined { mut client, mut endpoint, agent } = joined;
    endpoint.take_request();
    let total = endpoint.position + len;
    scope(|scope| {
        scope.spawn(|| client.read_to_end_at(total));
        endpoint.send(len);
        endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
    });
    drop(client);
    assert_eq!(endpoint.read_to_end(), b"", "the endpoint got bytes that nobody routed");
    scene.await_end(&agent);
    let seen = agent.watched.seen();
    assert_eq!((seen.state, seen.marks), (state::ENDED, 0), "{seen:?}");
    assert_eq!(agent.relayed as u64 + seen.bytes, total as u64, "{seen:?}");
    let (last, kept) = (agent.watched.last_bytes(), (TAIL as usize).min(seen.bytes as usize));
    assert_eq!((last.bytes.len(), last.are_all), (kept, kept == seen.bytes as usize));
    assert!((total - kept..total).map(byte).eq(last.bytes), "the last bytes differ");
    assert!(seen.segments > 0 && seen.first_ns > 0 && seen.last_ns >= seen.first_ns, "{seen:?}");
    assert!(!socket::has_more(&agent.client).expect("open") && !socket::has_more(&agent.endpoint).expect("open"));
    agent.release();
}

#[test]
fn stream_is_exact_and_ends_with_fin() {
    for family in BOTH {
        let scene = Scene::new(family);
        let joined = scene.join();
        finish(&scene, joined, 4 * MIB);
        assert_eq!(scene.wire.take_missed_events(), 0);
    }
}

#[test]
fn stream_is_exact_without_offloads() {
    for family in BOTH {
        let scene = Scene::new(family);
        scene.net.without_offloads();
        let joined = scene.join();
        finish(&scene, joined, MIB);
    }
}

#[test]
fn many_streams_use_records_again() {
    let scene = Scene::new(Family::Four);
    for number in 0..40 {
        let joined = scene.join();
        finish(&scene, joined, 500 * number);
    }
}

#[test]
fn client_that_closes_its_side_gets_the_whole_stream() {
    for family in BOTH {
        let scene = Scene::new(family);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        client.stream.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(endpoint.read_to_end(), b"");
        let total = endpoint.position + MIB;
        scope(|scope| {
            scope.spawn(|| client.read_to_end_at(total));
            endpoint.send(MIB);
            endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
        });
        scene.await_end(&agent);
        assert_eq!(agent.watched.seen().marks, mark::CLIENT_CLOSED_FIRST);
        agent.release();
    }
}

#[test]
fn reset_of_either_peer_reaches_the_other_at_once() {
    for (family, by_client) in BOTH.into_iter().flat_map(|family| [(family, true), (family, false)]) {
        let scene = Scene::new(family);
        let Joined { client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        let (from, mut to) =
            if by_client { (client.stream, endpoint.stream) } else { (endpoint.stream, client.stream) };
        socket::set_reset_on_close(&from, true);
        drop(from);
        // Bytes may come before the reset.
        let error = to.read_to_end(&mut Vec::new()).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?} by client: {by_client}");
        scene.await_end(&agent);
        let by = if by_client { mark::CLIENT_RESET } else { mark::ENDPOINT_RESET };
        assert_eq!(agent.watched.seen().marks, by);
        agent.release();
    }
}

#[test]
fn connection_that_breaks_before_the_flow_says_so_once() {
    for (family, by_client) in BOTH.into_iter().flat_map(|family| [(family, true), (family, false)]) {
        let scene = Scene::new(family);
        let (client, endpoint, (near, far)) = scene.connect(None);
        let watched = scene.watch(&near, &far).expect("watch");
        read(&mut near.try_clone().expect("a socket"), &mut [0; 2]).expect("the request");
        assert!(watched.arm(&near, &far).expect("both are well"));
        let (breaks, broken) = if by_client { (client, &near) } else { (endpoint, &far) };
        socket::set_reset_on_close(&breaks, true);
        drop(breaks);
        let mut wait = [PollFd::new(broken.as_fd(), PollFlags::empty())];
        assert_eq!(poll(&mut wait, PollTimeout::from(30_000u16)).expect("poll"), 1, "no reset arrived");
        assert!(watched.disarm());
        let error = watched.arm(&near, &far).expect_err("a reset");
        assert_eq!(error.is_client(), by_client, "{error}");
        // The error is no longer there.
        assert!(!watched.arm(&near, &far).expect("an end that looks orderly"));
    }
}

#[test]
fn what_a_client_sends_never_reaches_the_endpoint() {
    for family in BOTH {
        let scene = Scene::new(family);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        client.stream.write_all(b"GET /unrouted HTTP/1.1\r\n\r\n").expect("write");
        let total = endpoint.position + MIB;
        scope(|scope| {
            scope.spawn(|| client.read_up_to(total));
            endpoint.send(MIB);
        });
        let seen = agent.watched.seen();
        assert!(seen.refused > 0 && seen.marks == mark::CLIENT_SENT && seen.state == state::ACTIVE, "{seen:?}");
        assert!(!socket::has_more(&endpoint.stream).expect("open"), "the endpoint got bytes that nobody routed");
        // Its FIN cannot be passed on, because bytes before it are missing.
        drop(client);
        let error = read(&mut endpoint.stream, &mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        scene.await_end(&agent);
        assert!(!socket::has_more(&agent.client).expect("open"));
        agent.release();
    }
}

#[test]
fn slow_client_closes_the_window_and_gets_every_byte() {
    for family in BOTH {
        let scene = Scene::new(family);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        let total = endpoint.position + 8 * MIB;
        scope(|scope| {
            let sender = scope.spawn(|| {
                endpoint.send(8 * MIB);
                endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
            });
            // The buffers on the way hold less, so the window closes.
            let deadline = std::time::Instant::now() + scene::SOON;
            let (_nothing, never) = std::sync::mpsc::channel::<()>();
            let mut before = u64::MAX;
            while agent.watched.seen().bytes != before {
                assert!(std::time::Instant::now() < deadline, "the endpoint does not stop");
                before = agent.watched.seen().bytes;
                assert!(never.recv_timeout(Duration::from_millis(300)).is_err());
            }
            assert!(!sender.is_finished(), "the window did not close");
            client.read_to_end_at(total);
        });
        drop(client);
        assert_eq!(endpoint.read_to_end(), b"");
        scene.await_end(&agent);
        assert_eq!(agent.relayed as u64 + agent.watched.seen().bytes, total as u64);
        agent.release();
    }
}

#[test]
fn sockets_of_a_flow_are_closed_unheard() {
    for family in BOTH {
        let scene = Scene::new(family);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        agent.watched.close(&agent.client, &agent.endpoint);
        let total = endpoint.position + MIB;
        scope(|scope| {
            scope.spawn(|| client.read_to_end_at(total));
            endpoint.send(MIB);
            endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
        });
        drop(client);
        assert_eq!(endpoint.read_to_end(), b"");
        let seen = agent.watched.seen();
        assert!(seen.silenced >= 2 && seen.marks == 0, "{seen:?}");
    }
}

#[test]
fn agent_resets_both_peers() {
    for family in BOTH {
        let scene = Scene::new(family);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        endpoint.send(1000);
        client.read_up_to(endpoint.position);
        agent.watched.close(&agent.client, &agent.endpoint);
        // The agent's threads are in the namespace of its interfaces.
        scene.net.agent.run(|| agent.watched.reset());
        let error = read(&mut client.stream, &mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
        let error = read(&mut endpoint.stream, &mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
    }
}

/// A socket filter that drops one packet in `one_in` before TCP sees it (SKF_AD_RANDOM).
fn lose(stream: &std::net::TcpStream, one_in: u32) {
    const RANDOM: u32 = (-0x1000i32 + 56) as u32;
    let code = |code: u32, jt, jf, k| socket2::SockFilter::new(code as u16, jt, jf, k);
    let filter = [
        code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, RANDOM),
        code(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 1, 0, u32::MAX / one_in),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        code(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    socket2::SockRef::from(stream).attach_filter(&filter).expect("filter");
}

#[test]
fn lost_packets_are_repeated_between_the_peers() {
    for (family, offloads) in BOTH.into_iter().flat_map(|family| [(family, true), (family, false)]) {
        let scene = Scene::new(family);
        if !offloads {
            scene.net.without_offloads();
        }
        let joined = scene.join();
        lose(&joined.client.stream, 30);
        lose(&joined.endpoint.stream, 30);
        finish(&scene, joined, MIB);
    }
}

#[test]
fn flow_whose_packets_are_not_seen_stays_with_the_relay() {
    let scene = Scene::attached(Family::Four, &[TO_CLIENT]);
    let (client, endpoint, (near, far)) = scene.connect(None);
    let watched = scene.watch(&near, &far).expect("watch");
    let (mut client, mut endpoint) =
        (scene::Reader { stream: client, position: 0 }, scene::Sender { stream: endpoint, position: 0 });
    let total = 50 * 300;
    scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                endpoint.send(300);
            }
        });
        scope.spawn(|| client.read_up_to(total));
        let relayed = std::cell::Cell::new(0);
        relayed.set(relay(&watched, &near, &far, |watched| {
            assert!(!watched.has_begun());
            socket::acknowledged(&near).expect("open") >= total as u64
        }));
        assert_eq!(relayed.get(), total);
    });
    assert_eq!((watched.seen().state, watched.seen().packets), (state::ARMED, 0));
    assert_eq!(watched.seen().refusal, refusal::NONE, "a program considered a packet");
    assert!(watched.disarm() && watched.seen().state == state::WATCHED);
}

#[test]
fn connection_that_uses_a_port_again_is_not_rewritten() {
    for family in BOTH {
        let scene = Scene::new(family);
        let from = family.client(40_000);
        let Joined { client, endpoint: _endpoint, agent } = scene.join_from(Some(from));
        let near = client.stream.peer_addr().expect("connected");
        socket::set_reset_on_close(&client.stream, true);
        drop(client);
        scene.await_end(&agent);
        // The agent has not released the flow, and listens on the same port again.
        let front = scene.net.agent.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::for_address(near), socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&near.into()).unwrap();
            socket.listen(1).unwrap();
            socket
        });
        let (first, second) = (agent.client, agent.endpoint);
        socket::set_reset_on_close(&first, true);
        drop(first);
        let again = scene.net.client.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::for_address(near), socket2::Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect_timeout(&near.into(), scene::SOON).expect("connect");
            socket
        });
        let (mut accepted, _) = front.accept().expect("accept");
        (&again).write_all(b"again").expect("write");
        let mut got = [0; 5];
        accepted.read_exact(&mut got).expect("read");
        assert_eq!((&got, agent.watched.seen().state), (b"again", state::REPLACED));
        drop((agent.watched, second));
        (&again).write_all(b"after").expect("write");
        accepted.read_exact(&mut got).expect("the new connection is still known to no flow");
        assert_eq!(&got, b"after");
    }
}

#[test]
fn client_of_small_segments_is_unfit() {
    let scene = Scene::new(Family::Four);
    scene.net.client.ip(&format!("link set {TO_CLIENT} mtu 1400"));
    let (_client, _endpoint, (near, far)) = scene.connect(None);
    let refused = scene.watch(&near, &far).err().expect("unfit");
    let WireError::Unfit(Unfit::Segments { client, endpoint }) = refused else { panic!("{refused}") };
    assert!(client < endpoint, "{client} {endpoint}");
}
