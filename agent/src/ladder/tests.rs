//! The ladder on this kernel, and with paths and capabilities missing.

use super::*;

fn config() -> config::Steering {
    config::Steering { max_flows: 64, ..config::Steering::default() }
}

#[test]
fn every_path_is_ready_on_this_kernel() {
    let ladder = Ladder::climb(&config());
    assert_eq!(ladder.describe(), "steering: active (local, ingress)");
    let [_, local, ingress] = &ladder.lines()[..] else { panic!("{:?}", ladder.lines()) };
    assert_eq!(ingress, "path ingress: ready");
    let SteeringSupport::Active(kernel) = ladder.steering() else { panic!("not active") };
    assert_eq!(kernel.local(), Ok(()));
    // If an endpoint can observe the map, the line includes how, and for which connections.
    match kernel.endpoint_visible() {
        None => assert_eq!(local, "path local: ready"),
        Some(how) => {
            let said = format!("path local: ready, endpoint_visible for upgraded and pinned connections: {how}");
            assert_eq!(local, &said);
            let info = format!("reason=\"passed{}\"", said.trim_start_matches("path local: ready"));
            assert!(shown(&ladder, "local").contains(&info), "{}", shown(&ladder, "local"));
        }
    }
    assert!(ladder.rungs.iter().all(|rung| rung.checks.len() == selftest::CASES.len()));
}

#[test]
fn kernel_that_may_lose_bytes_is_refused_unless_forced() {
    let refused = Ladder::climb_on("6.1.0-9-amd64", &config());
    assert!(matches!(refused.program, Program::Refused(_)) && !refused.is_ready(Path::Ingress));
    let why = "kernel 6.1.0-9-amd64 may lose or repeat bytes in sockmap; use --force to steer anyway";
    let off = ["path local", "path ingress"].map(|path| format!("{path}: off: {why}"));
    assert_eq!(refused.lines(), [format!("steering: unavailable: {why}"), off[0].clone(), off[1].clone()]);

    let forced = Ladder::climb_on("6.1.0-9-amd64", &config::Steering { force: true, ..config() });
    assert!(forced.is_ready(Path::Ingress) && matches!(forced.steering(), SteeringSupport::Active(_)));
    let said = "steering: active (local, ingress), forced on kernel 6.1.0-9-amd64, which may lose or repeat bytes";
    assert_eq!(forced.describe(), said);

    let metrics = Metrics::new(&[]);
    forced.announce(&metrics);
    let text = metrics.encode();
    let info = r#"penstock_steering_path_info{path="ingress",reason="passed, forced on kernel 6.1.0-9-amd64"} 1"#;
    assert!(text.contains(info) && text.contains(r#"penstock_steering_path_active{path="ingress"} 1"#), "{text}");

    // Force changes nothing on a sound kernel.
    let sound = Ladder::climb(&config::Steering { force: true, ..config() });
    assert_eq!(sound.describe(), "steering: active (local, ingress)");
}

#[test]
fn wire_is_off_if_a_case_fails_and_ready_if_none_can_run() {
    let off = Rung::prove_wire(selftest::WIRE_FAILING);
    assert_eq!(off.describe(), "wire: off: self-test: bad: a hole at 7");

    let unproven = crate::capability::with(&crate::capability::LOADING, || Rung::prove_wire(selftest::WIRE_CASES));
    let why = "without a self-test: cannot make network namespaces (needs CAP_SYS_ADMIN): Operation not permitted (os error 1)";
    assert_eq!((unproven.describe(), unproven.checks.len()), (format!("wire: ready, {why}"), 0));
}

fn climb(config: &config::Steering, entries: &[PathTest; 2]) -> Ladder {
    Ladder::load(config, entries).expect("load")
}

/// The metrics lines of a path.
fn shown(ladder: &Ladder, path: &str) -> String {
    let metrics = Metrics::new(&[]);
    ladder.announce(&metrics);
    let label = format!("{{path=\"{path}\"");
    metrics.encode().lines().filter(|line| line.contains(&label)).collect::<Vec<_>>().join("\n")
}

#[test]
fn failed_local_path_is_off_and_its_programs_are_unloaded() {
    let ladder = climb(&config(), &[PathTest { cases: selftest::FAILING, ..LOCAL }, INGRESS]);
    assert_eq!(ladder.describe(), "steering: active (ingress)");
    let why = "self-test: bad: a hole at 7";
    assert_eq!(ladder.lines()[1..], [format!("path local: off: {why}"), "path ingress: ready".to_owned()]);
    let SteeringSupport::Active(kernel) = ladder.steering() else { panic!("not active") };
    assert_eq!(kernel.local(), Err(why.into()));
    let metrics = shown(&ladder, "local");
    assert!(metrics.contains(r#"penstock_steering_path_active{path="local"} 0"#), "{metrics}");
    let info = format!(r#"penstock_steering_path_info{{path="local",reason="{why}"}} 1"#);
    assert!(metrics.contains(&info), "{metrics}");
    assert!(shown(&ladder, "ingress").contains(r#"penstock_steering_path_active{path="ingress"} 1"#));
}

#[test]
fn failed_ingress_path_disables_steering() {
    let ladder = climb(&config(), &[LOCAL, PathTest { cases: selftest::FAILING, ..INGRESS }]);
    let SteeringSupport::Unavailable(why) = ladder.steering() else { panic!("not unavailable") };
    assert!(matches!(ladder.program, Program::Unproven) && !ladder.forces_buffers);
    assert!(why.contains("ingress: off: self-test: bad: a hole at 7"), "{why}");
    assert_eq!(ladder.lines()[1], "path local: off: it needs path ingress as fallback, which is off");
    assert!(ladder.describe().starts_with("steering: unavailable: "));
}

#[test]
fn missing_cgroup_disables_the_local_path() {
    let nowhere = config::Steering { cgroup: Some("/nowhere/cgroup".into()), ..config() };
    let ladder = Ladder::climb(&nowhere);
    assert_eq!(ladder.describe(), "steering: active (ingress)");
    let said = &ladder.lines()[1];
    assert!(said.starts_with("path local: off: cgroup /nowhere/cgroup: ") && said.contains("No such file"), "{said}");

    let unasked = Ladder::climb(&config::Steering { mode: SteeringMode::Ingress, ..config() });
    assert_eq!(unasked.lines()[1..], ["path local: off (configured)", "path ingress: ready"]);
    assert!(shown(&unasked, "local").contains(r#"reason="configured""#));
}

/// Climbs with these capabilities alone. aya asks the kernel what it can do once for the whole process: here, with all of them.
fn climb_with(kept: &[Capability]) -> Ladder {
    drop(Kernel::load(64));
    capability::with(kept, || Ladder::climb(&config()))
}

#[test]
fn missing_capabilities_are_named() {
    let ladder = climb_with(&[Capability::CAP_BPF]);
    let said = ladder.describe();
    let lacks = "steering: unavailable: this process lacks CAP_NET_ADMIN, CAP_PERFMON: ";
    assert!(said.starts_with(lacks) && said.contains("Operation not permitted"), "{said}");
    assert_eq!(ladder.lines()[2], said.replace("steering: unavailable", "path ingress: off"));
    assert!(matches!(ladder.program, Program::Failed(_)));
}

/// A new network namespace, whose loopback interface is down.
#[test]
fn node_without_loopback_starts_at_once_without_steering() {
    let climbed = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
        let begun = Instant::now();
        let ladder = Ladder::climb(&config());
        (ladder.lines(), begun.elapsed())
    });
    let (lines, took) = climbed.join().expect("no panic");
    assert!(took < std::time::Duration::from_secs(4), "{took:?}");
    let why = "path local: off: the self-test needs loopback connections: ";
    assert!(lines[1].starts_with(why), "{lines:?}");
}

#[test]
fn only_a_large_send_buffer_needs_a_capability() {
    let small = Ladder::climb(&config::Steering { client_send_buffer: 64 << 10, ..config() });
    assert!(small.is_ready(Path::Ingress) && !small.forces_buffers);
    // Larger than any machine's net.core.wmem_max.
    let large = Ladder::climb(&config::Steering { client_send_buffer: 1 << 30, ..config() });
    assert!(large.is_ready(Path::Ingress));
    assert!(large.forces_buffers);
}

#[test]
fn reason_leaves_out_the_verifier_output() {
    let said = climb_with(&[Capability::CAP_BPF, Capability::CAP_NET_ADMIN]).describe();
    let why = "this process lacks CAP_PERFMON: the kernel refused the program: the BPF_PROG_LOAD syscall returned \
               Permission denied (os error 13)";
    assert_eq!(said, format!("steering: unavailable: {why}"));
}

#[test]
fn mode_off_turns_every_path_off() {
    let ladder = Ladder::climb(&config::Steering { mode: SteeringMode::Off, force: true, ..config() });
    assert!(matches!(ladder.steering(), SteeringSupport::Off));
    let lines = ["steering: off (configured)", "path local: off (configured)", "path ingress: off (configured)"];
    assert_eq!(ladder.lines(), lines);
}
