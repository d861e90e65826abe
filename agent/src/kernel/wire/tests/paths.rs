//! Ways between the peers that take only small packets, that change, and that go.

use std::{io::ErrorKind, net::Shutdown, thread::scope, time::Instant};

use nix::net::if_::if_nametoindex;
use penstock_common::wire::flow::ENDPOINT;

use super::{
    super::FlowStop,
    BOTH, MIB, finish,
    net::{Family, Net, TO_CLIENT, TO_ENDPOINT},
    scene::{Joined, SOON, Scene, read},
};

/// A second link between agent and endpoint.
const SECOND: &str = "e1";

#[test]
fn errors_about_large_packets_reach_the_endpoint() {
    for (family, offloads) in BOTH.into_iter().flat_map(|family| [(family, true), (family, false)]) {
        let net = Net::new();
        let _router = net.narrow();
        if !offloads {
            net.without_offloads();
        }
        let scene = Scene::on(net, family, &[TO_CLIENT, TO_ENDPOINT]);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        let total = endpoint.position + MIB;
        scope(|scope| {
            scope.spawn(|| client.read_to_end_at(total));
            endpoint.send(MIB);
            endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
        });
        let seen = agent.watched.seen();
        assert!(seen.too_big > 0, "{family:?}: {seen:?}");
        assert_eq!(agent.relayed as u64 + seen.bytes, total as u64, "{seen:?}");
        agent.release();
    }
}

/// A scene with two links to the endpoint, whose programs are attached to these interfaces.
fn with_second_link(family: Family, interfaces: &[&str]) -> Scene {
    let net = Net::new();
    net.join(SECOND, &net.endpoint, 3);
    Scene::on(net, family, interfaces)
}

/// Moves the routes between agent and endpoint to the second link.
fn move_routes(net: &Net, family: Family) {
    let (agent, endpoint, flag) = match family {
        Family::Four => (["10.2.0.2/32", "10.3.0.2"], ["10.2.0.1/32", "10.3.0.1"], "-4"),
        Family::Six => (["fd00:2::2/128", "fd00:3::2"], ["fd00:2::1/128", "fd00:3::1"], "-6"),
    };
    for (place, [to, via]) in [(&net.endpoint, endpoint), (&net.agent, agent)] {
        place.ip(&format!("{flag} route replace {to} via {via} dev {SECOND}"));
    }
}

#[test]
fn flow_follows_a_route_that_moves() {
    for family in BOTH {
        let scene = with_second_link(family, &[TO_CLIENT, TO_ENDPOINT, SECOND]);
        let mut joined = scene.join();
        let second = scene.net.agent.run(|| if_nametoindex(SECOND)).expect("an interface");
        let flow = &scene.wire.registry.active()[0];
        let leaves_on = || flow.table.words(flow.index).legs[ENDPOINT].leaves_on.get() as u32;
        assert_ne!(leaves_on(), second);
        move_routes(&scene.net, family);
        let deadline = Instant::now() + SOON;
        while leaves_on() != second {
            assert!(Instant::now() < deadline, "the flow keeps its interface");
            std::thread::yield_now();
        }
        if family == Family::Four {
            // IPv6 would lose its addresses with the link.
            scene.net.endpoint.ip(&format!("link set {TO_ENDPOINT} down"));
        }
        joined.endpoint.send(1000);
        finish(&scene, joined, MIB);
    }
}

#[test]
fn flow_without_a_way_is_ended() {
    type Change = fn(&Net, Family);
    let rows: [(&[&str], Change, bool); 2] = [
        // The programs are not attached to the second link.
        (&[TO_CLIENT, TO_ENDPOINT], move_routes, true),
        (&[TO_CLIENT, TO_ENDPOINT], |net, _| net.agent.ip(&format!("link del {TO_ENDPOINT}")), false),
    ];
    for (family, (interfaces, change, is_reachable)) in
        BOTH.into_iter().flat_map(|family| rows.map(|row| (family, row)))
    {
        let scene = with_second_link(family, interfaces);
        let Joined { mut client, mut endpoint, agent } = scene.join();
        endpoint.take_request();
        client.read_up_to(endpoint.position);
        // The flow's own interfaces are the ones that the routing table names.
        change(&scene.net, family);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let stopped = runtime.block_on(async { tokio::time::timeout(SOON, agent.watched.stopped()).await });
        assert_eq!(stopped.ok(), Some(FlowStop::Unrouted), "{family:?}");
        agent.watched.close(&agent.client, &agent.endpoint);
        scene.net.agent.run(|| agent.watched.reset());
        let error = read(&mut client.stream, &mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
        if is_reachable {
            let error = read(&mut endpoint.stream, &mut [0]).expect_err("a reset");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
        }
    }
}
