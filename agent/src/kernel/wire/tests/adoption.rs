//! What outlives an agent: flows that run on, their adoption by the next agent, and their removal.

use std::{io::ErrorKind, net::Shutdown, process::Command, sync::Arc, thread::scope};

use aya::programs::{SchedClassifier, TcAttachType, tc::qdisc_add_clsact};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};
use penstock_common::wire::flow::VERSION;

use super::{
    super::{Adopted, Adoption, Namespace, Wire, detach, netns, pinned, qdisc, silence},
    BOTH, MIB, finish,
    net::{Family, Net, TO_CLIENT, TO_ENDPOINT},
    scene::{Joined, Reader, Scene, Sender, read},
};
use crate::{config::Bpffs, kernel::socket::monotonic_ns};

/// Runs with a bpffs in a mount namespace of its own, which ends with the thread.
fn with_bpffs(test: impl FnOnce(&Bpffs) + Send + 'static) {
    let run = move || {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_str().expect("a path");
        unshare(CloneFlags::CLONE_NEWNS).expect("root");
        for arguments in [&["--make-rprivate", "/"][..], &["-t", "bpf", "none", path]] {
            assert!(Command::new("mount").args(arguments).status().expect("mount").success(), "mount {arguments:?}");
        }
        test(&Bpffs::At(path.into()));
        assert!(Command::new("umount").arg(path).status().expect("umount").success());
    };
    std::thread::spawn(run).join().expect("no panic");
}

/// An agent's programs in a namespace, pinned. `tcx`: by links of TCX, otherwise in the clsact qdisc.
fn pin(net: &Net, place: &Bpffs, tcx: bool) -> Arc<Wire> {
    net.agent.run(|| {
        let namespace = Namespace::open(place).expect("a bpffs").expect("wanted");
        let mut wire = Wire::load(16).expect("load");
        wire.attached.tcx = tcx;
        wire.pin(&namespace).expect("pin");
        [TO_CLIENT, TO_ENDPOINT].iter().for_each(|name| wire.attach(name).expect("attach"));
        Arc::new(wire)
    })
}

fn scene(family: Family, place: &Bpffs, tcx: bool) -> Scene {
    let net = Net::new();
    let wire = pin(&net, place, tcx);
    Scene { net, wire, family }
}

fn adoption(net: &Net, place: &Bpffs, wire: &Arc<Wire>) -> Adoption {
    net.agent.run(|| wire.adoption(Namespace::open(place).expect("a bpffs").expect("wanted")))
}

/// What the kernel does to a killed process: it closes the sockets, maps and programs. Nobody resets or forgets.
fn kill(wire: Arc<Wire>, joined: Vec<Joined>) -> Vec<(Reader, Sender)> {
    let streams = joined
        .into_iter()
        .map(|Joined { client, mut endpoint, agent }| {
            endpoint.take_request();
            agent.watched.freeze(&agent.client, &agent.endpoint);
            agent.watched.leave();
            (client, endpoint)
        })
        .collect();
    drop(wire);
    streams
}

/// Sends more of a stream, and its end.
fn run_on(client: &mut Reader, endpoint: &mut Sender) {
    let total = endpoint.position + MIB;
    scope(|scope| {
        scope.spawn(|| client.read_to_end_at(total));
        endpoint.send(MIB);
        endpoint.stream.shutdown(Shutdown::Write).expect("shutdown");
    });
    client.stream.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(endpoint.read_to_end(), b"");
}

/// Programs attached to the agent's interfaces by TCX, which Linux has since 6.6: `None` before.
fn programs(net: &Net) -> Option<usize> {
    let at = |name: &str| {
        [TcAttachType::Ingress, TcAttachType::Egress]
            .map(|place| Some(SchedClassifier::query_tcx(name, place).ok()?.1.len()))
    };
    net.agent.run(|| [TO_CLIENT, TO_ENDPOINT].iter().flat_map(|name| at(name)).sum())
}

/// Whether so many programs are attached, as far as the kernel can tell.
fn has(net: &Net, count: usize) -> bool {
    programs(net).is_none_or(|found| found == count)
}

fn is_empty(place: &Bpffs) -> bool {
    let Bpffs::At(path) = place else { panic!("no path") };
    !path.join("penstock").exists()
}

fn only(adoption: &mut Adoption) -> Adopted {
    let (mut adopted, notes) = adoption.scan();
    assert_eq!(notes, [""; 0]);
    assert_eq!(adopted.len(), 1);
    adopted.remove(0)
}

#[test]
fn streams_outlive_the_agent_and_are_adopted() {
    with_bpffs(|place| {
        for (family, tcx) in [(BOTH[0], true), (BOTH[1], true), (BOTH[0], false)] {
            let Scene { net, wire, family } = scene(family, place, tcx);
            let scene = Scene { net, wire, family };
            let joined: Vec<_> = (0..5).map(|_| scene.join()).collect();
            let relayed: Vec<_> = joined.iter().map(|joined| joined.agent.relayed as u64).collect();
            let Scene { net, wire, .. } = scene;
            let mut streams = kill(wire, joined);

            let wire = pin(&net, place, tcx);
            let mut adoption = adoption(&net, place, &wire);
            let mut adopted = net.agent.run(|| only(&mut adoption));
            assert_eq!(adopted.flows().len(), 5);
            let now = monotonic_ns();
            assert!(adopted.flows().iter().all(|flow| silence(&adopted.seen(flow), now).as_secs() < 30));
            // Its port is not used again.
            let port = streams[0].1.stream.peer_addr().expect("connected");
            let taken = net.agent.run(|| std::net::TcpListener::bind(port));
            assert_eq!(taken.expect_err("reserved").kind(), ErrorKind::AddrInUse);

            streams.iter_mut().for_each(|(client, endpoint)| run_on(client, endpoint));
            let mut bytes = Vec::new();
            adopted.count(|one, flow| {
                let seen = one.seen(flow);
                bytes.push(seen.bytes);
                assert!(seen.finished && seen.told_all && seen.marks == 0, "{seen:?}");
                seen.has_ended()
            });
            let totals =
                streams.iter().zip(&relayed).map(|((_, endpoint), relayed)| endpoint.position as u64 - relayed);
            assert_eq!(bytes.iter().sum::<u64>(), totals.sum::<u64>());
            assert_eq!((adopted.flows().len(), adopted.tidy()), (0, false), "late packets are still rewritten");
            net.agent.run(|| adopted.remove());
            drop(adoption);
            net.agent.run(|| drop(wire));
            assert!(has(&net, 0) && is_empty_of(place, &net));
            if !tcx {
                assert!(net.agent.run(|| qdisc_add_clsact(TO_CLIENT)).is_ok(), "the qdisc has stayed");
            }
        }
    });
}

/// Whether no agent's folder is left in the namespace.
fn is_empty_of(place: &Bpffs, net: &Net) -> bool {
    net.agent.run(|| pinned(place).expect("readable").is_empty())
}

#[test]
fn two_agents_leave_each_other_alone() {
    with_bpffs(|place| {
        let first = scene(Family::Four, place, true);
        let second = pin(&first.net, place, true);
        let mut adoption = adoption(&first.net, place, &second);
        let (adopted, notes) = first.net.agent.run(|| adoption.scan());
        assert!(adopted.is_empty() && notes.is_empty());
        let joined = first.join();
        let listed = first.net.agent.run(|| pinned(place)).expect("readable");
        let flows: Vec<_> = listed.iter().map(|one| (one.is_alive, one.flows.as_ref().map(Vec::len))).collect();
        assert_eq!(flows, [(true, Ok(1)), (true, Ok(0))]);
        // Neither is detached, and the end of one is nothing to the other.
        let done = first.net.agent.run(|| detach(place)).expect("detach");
        assert_eq!((done.instances, done.alive.len()), (0, 2));
        drop(adoption);
        first.net.agent.run(|| drop(second));
        assert!(has(&first.net, 4));
        finish(&first, joined, MIB);
    });
}

#[test]
fn detach_resets_both_peers_and_leaves_nothing() {
    with_bpffs(|place| {
        for (family, tcx) in [(BOTH[0], true), (BOTH[1], false)] {
            let scene = scene(family, place, tcx);
            let joined = vec![scene.join(), scene.join()];
            let Scene { net, wire, .. } = scene;
            let streams = kill(wire, joined);
            let done = net.agent.run(|| detach(place)).expect("detach");
            assert_eq!((done.instances, done.flows, done.alive.len()), (1, 2, 0));
            for (mut client, mut endpoint) in streams {
                client.read_up_to(endpoint.position);
                for stream in [&mut client.stream, &mut endpoint.stream] {
                    let error = read(stream, &mut [0]).expect_err("a reset");
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
                }
            }
            assert!(is_empty(place));
            assert!(has(&net, 0));
            assert!(net.agent.run(|| qdisc_add_clsact(TO_ENDPOINT)).is_ok(), "the qdisc has stayed");
        }
    });
}

#[test]
fn flows_of_another_version_are_reported_and_not_adopted() {
    with_bpffs(|place| {
        let scene = scene(Family::Four, place, true);
        let joined = vec![scene.join()];
        let Scene { net, wire, .. } = scene;
        let mut streams = kill(wire, joined);
        let Bpffs::At(path) = place else { panic!("no path") };
        let cookie = net.agent.run(|| netns::cookie().expect("Linux 5.14"));
        let folder = path.join("penstock").join(cookie.to_string());
        std::fs::rename(folder.join(format!("0_v{VERSION}")), folder.join("0_v0")).expect("rename");

        let wire = pin(&net, place, true);
        let mut adoption = adoption(&net, place, &wire);
        let (adopted, notes) = net.agent.run(|| adoption.scan());
        assert!(adopted.is_empty() && notes.len() == 1 && notes[0].contains("another version (0)"), "{notes:?}");
        assert_eq!(net.agent.run(|| adoption.scan()).1, [""; 0], "reported twice");
        let (client, endpoint) = &mut streams[0];
        run_on(client, endpoint);
        drop(adoption);
        net.agent.run(|| drop(wire));
        assert!(has(&net, 4), "the programs of the other version were removed");
        assert_eq!(net.agent.run(|| detach(place)).expect("detach").instances, 1);
        assert!(is_empty(place) && has(&net, 0));
    });
}

#[test]
fn folder_of_a_namespace_that_is_gone_is_removed() {
    with_bpffs(|place| {
        let gone = scene(Family::Four, place, true);
        let joined = vec![gone.join()];
        let Scene { net, wire, .. } = gone;
        let streams = kill(wire, joined);
        let here = Net::new();
        if programs(&here).is_none() {
            // The pin of a filter does not tell whether its interface is gone (docs/limits.md).
            return;
        }
        let wire = pin(&here, place, true);
        let sweep = || adoption(&here, place, &wire).sweep();
        sweep();
        assert!(!is_empty_of(place, &net), "the namespace exists");
        let Bpffs::At(path) = place else { panic!("no path") };
        let cookie = net.agent.run(|| netns::cookie().expect("Linux 5.14"));
        drop((net, streams));
        // The kernel removes a namespace in the background.
        let folder = path.join("penstock").join(cookie.to_string());
        let deadline = std::time::Instant::now() + super::scene::SOON;
        while std::fs::read_dir(&folder).is_ok_and(|entries| entries.count() > 0) {
            assert!(std::time::Instant::now() < deadline, "the folder is still there");
            sweep();
            std::thread::yield_now();
        }
    });
}

#[test]
fn filters_of_others_keep_the_qdisc() {
    let net = Net::new();
    net.agent.run(|| {
        qdisc_add_clsact(TO_CLIENT).expect("clsact");
        assert!(qdisc_add_clsact(TO_CLIENT).is_err());
        let mut wire = Wire::load(1).expect("load");
        wire.attached.tcx = false;
        wire.attach(TO_CLIENT).expect("attach");
        let index = if_nametoindex(TO_CLIENT).expect("it exists");
        assert!(!qdisc::remove_if_empty(index).expect("netlink"), "it has filters");
        drop(wire);
        assert!(qdisc_add_clsact(TO_CLIENT).is_err(), "it is not the agent's");
        assert!(qdisc::remove_if_empty(index).expect("netlink"));
        assert!(qdisc_add_clsact(TO_CLIENT).is_ok());
    });
}
