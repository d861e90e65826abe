//! `penstock doctor`: reports what this machine lets the agent do, whether what the configuration names works, and how to fix
//! what is missing.
//!
//! The text, the JSON document and the exit code show the same findings. The findings about paths come from the code
//! that `penstock run` uses at start.

use std::{path::Path, process::ExitCode, time::Duration};

use penstock_agent::{
    capability,
    command::{
        CgroupError, Check, Kernel, Ladder, Pinned, Program, Rung, RungState, WIRE_CASES, Wire, cgroup, pinned, version,
    },
    config::{self, Bpffs, Config, SteeringMode},
    trial::{self, Trial},
};
use serde_json::{Value, json};

/// Exit code if no path is ready: every byte is relayed.
const RELAY_ONLY: u8 = 1;
/// Exit code if some path is off.
const SOME_OFF: u8 = 2;
/// Exit code if an EPP or an endpoint of the configuration does not work, whatever the paths.
const NOT_AS_CONFIGURED: u8 = 3;

/// The result of one check.
struct Finding {
    name: String,
    ok: bool,
    found: String,
    /// What to do about it, if something can be done.
    advice: Option<String>,
}

/// Runs all checks and prints the result. With a configuration and its file, tries also what it names.
pub(crate) fn run(mut steering: config::Steering, config: Option<(&Config, &Path)>, as_json: bool) -> ExitCode {
    // Checks all paths, even if the settings do not enable them.
    steering.mode = SteeringMode::Auto;
    let ladder = Ladder::climb(&steering);
    let findings = machine(&steering, &ladder);
    let trials = config.map(|(config, file)| trials(config, file)).unwrap_or_default();
    let (code, verdict) = verdict(&ladder, &trials);
    if as_json {
        println!("{:#}", document(&findings, &ladder, &trials, code, &verdict));
    } else {
        findings.iter().for_each(Finding::print);
        ladder.rungs.iter().for_each(print_path);
        print_trials(&trials);
        println!("{:<15}{verdict}", "result");
    }
    ExitCode::from(code)
}

/// Tries the EPPs and endpoints of the configuration, and whether the agent could read its files.
fn trials(config: &Config, file: &Path) -> Vec<Trial> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let mut trials = match runtime {
        Ok(runtime) => runtime.block_on(trial::try_all(config)),
        Err(error) => vec![Trial {
            name: "runtime".to_owned(),
            ok: false,
            found: error.to_string(),
            advice: Some("raise the limit of open files".to_owned()),
        }],
    };
    let is_new = |new: &Trial| trials.iter().all(|trial| trial.name != new.name);
    let unreadable: Vec<_> = trial::unreadable(config, file).into_iter().filter(is_new).collect();
    trials.extend(unreadable);
    trials
}

fn verdict(ladder: &Ladder, trials: &[Trial]) -> (u8, String) {
    let (code, verdict) = machine_verdict(ladder);
    match trials.iter().filter(|trial| !trial.ok).count() {
        0 => (code, verdict),
        failed => {
            (NOT_AS_CONFIGURED, format!("{verdict}; failed trials of the configuration: {failed} of {}", trials.len()))
        }
    }
}

fn machine_verdict(ladder: &Ladder) -> (u8, String) {
    let off = ladder.rungs.iter().filter(|rung| rung.state != RungState::Ready).map(|rung| rung.path.label());
    let off: Vec<_> = off.collect();
    match off.len() {
        0 => (0, "every path is ready".to_owned()),
        n if n == ladder.rungs.len() => (RELAY_ONLY, "the agent relays every byte in user space".to_owned()),
        _ => (SOME_OFF, format!("the agent steers, except on: {}", off.join(", "))),
    }
}

/// All checks except those of the paths.
fn machine(steering: &config::Steering, ladder: &Ladder) -> Vec<Finding> {
    let release = version::release();
    let sound = version::is_sound(&release);
    let mut findings = vec![Finding {
        name: "kernel".to_owned(),
        ok: sound,
        found: if sound { release } else { format!("{release}: KNOWN to lose or repeat bytes in sockmap") },
        advice: (!sound).then(|| {
            let forced = if steering.force { "tried anyway, because it was forced" } else { "or use --force" };
            format!("upgrade to 6.16 or later, or to 6.1.142+, 6.6.94+, 6.12.34+ or 6.15.3+; {forced}")
        }),
    }];
    let missing = capability::missing();
    findings.extend(capability::LOADING.iter().map(|one| {
        let ok = !missing.contains(one);
        let advice = (!ok).then(|| "start as root, or grant this capability; see docs/capabilities.md".to_owned());
        Finding { name: one.to_string(), ok, found: if ok { "have" } else { "MISSING" }.to_owned(), advice }
    }));
    let btf = Path::new("/sys/kernel/btf/vmlinux");
    findings.push(Finding {
        name: "btf".to_owned(),
        ok: btf.exists(),
        found: if btf.exists() { btf.display().to_string() } else { "MISSING".to_owned() },
        advice: (!btf.exists()).then(|| "the kernel needs CONFIG_DEBUG_INFO_BTF; in a container, mount it".to_owned()),
    });
    findings.push(cgroup(steering));
    findings.push(program(ladder, missing.is_empty()));
    findings.push(wire());
    findings.push(flows(&steering.bpffs));
    if let Program::Loaded(kernel) = &ladder.program {
        findings.push(kept());
        if ladder.is_ready(penstock_common::path::Path::Local) {
            findings.push(endpoint_sockets(kernel));
        }
    }
    findings
}

/// Whether the programs of path `wire` can be loaded, and pass their self-test. The path is on trial, so the verdict does not depend
/// on it.
fn wire() -> Finding {
    let name = "wire programs".to_owned();
    if let Err(error) = Wire::load(1) {
        return Finding { name, ok: true, found: format!("cannot be used: {}", error.reason()), advice: None };
    }
    let rung = Rung::prove_wire(WIRE_CASES);
    let (proven, advice) = match (&rung.state, &rung.unproven) {
        (RungState::Off(why), _) => (format!("OFF: {why}"), None),
        (_, Some(why)) => (format!("no self-test: {why}"), Some("start doctor with CAP_SYS_ADMIN".to_owned())),
        (_, None) => (format!("self-test passed ({} cases)", rung.checks.len()), None),
    };
    Finding { name, ok: true, found: format!("{proven}; on trial: used only with steering.mode = \"wire\""), advice }
}

/// The flows of path `wire` in this network namespace.
fn flows(place: &Bpffs) -> Finding {
    const MOST: usize = 20;
    let name = "wire flows".to_owned();
    let agents = match pinned(place) {
        Ok(agents) => agents,
        Err(error) => {
            return Finding { name, ok: true, found: format!("cannot be read: {}", error.reason()), advice: None };
        }
    };
    let mut lines = Vec::new();
    for Pinned { folder, is_alive, flows } in &agents {
        let owner = if *is_alive { "its agent is running" } else { "its agent is gone" };
        match flows {
            Err(error) => lines.push(format!("{folder}: {owner}, flows cannot be read: {error}")),
            Ok(flows) => {
                lines.push(format!("{folder}: {owner}, flows: {}", flows.len()));
                lines.extend(flows.iter().take(MOST).map(|flow| {
                    let (client, endpoint, bytes) = (flow.client, flow.endpoint, flow.bytes);
                    format!("  {client} <- {endpoint}: {bytes} bytes, quiet for {}", milliseconds(flow.quiet))
                }));
                lines.extend((flows.len() > MOST).then(|| format!("  and {} more", flows.len() - MOST)));
            }
        }
    }
    let orphans = agents.iter().any(|agent| !agent.is_alive);
    let advice = orphans.then(|| "the next agent adopts them; `penstock detach` ends them".to_owned());
    let found = if lines.is_empty() { "none".to_owned() } else { lines.join(&format!("\n{:<15}", "")) };
    Finding { name, ok: true, found, advice }
}

/// Whether an endpoint can observe that its socket is in a map.
fn endpoint_sockets(kernel: &Kernel) -> Finding {
    let (found, advice) = match kernel.endpoint_visible() {
        None => ("same behaviour inside and outside of a map".to_owned(), None),
        Some(how) => (
            format!("endpoint_visible: in a map, {how}"),
            Some("upgraded and pinned connections use path ingress, responses use path local".to_owned()),
        ),
    };
    Finding { name: "sockets".to_owned(), ok: true, found, advice }
}

fn cgroup(steering: &config::Steering) -> Finding {
    let advice = "mount cgroup v2 (in a container, the node's), or set steering.cgroup";
    let (ok, found) = match steering.cgroup.clone().map_or_else(cgroup::root, Ok) {
        Ok(root) if root.join("cgroup.procs").exists() && cgroup::is_whole(&root) => (true, root.display().to_string()),
        Ok(root) if root.join("cgroup.procs").exists() => {
            (true, format!("{}: not the root, so endpoints outside of it are not recognised", root.display()))
        }
        Err(error @ CgroupError::Private(_)) => (false, format!("PRIVATE: {error}")),
        Ok(root) => (false, format!("MISSING: {} is not a cgroup v2 mount", root.display())),
        Err(error) => (false, format!("MISSING: {error}")),
    };
    Finding { name: "cgroup v2".to_owned(), ok, found, advice: (!ok).then(|| advice.to_owned()) }
}

/// The capabilities that a running agent keeps.
fn kept() -> Finding {
    Finding { name: "kept later".to_owned(), ok: true, found: "no capability".to_owned(), advice: None }
}

fn program(ladder: &Ladder, capable: bool) -> Finding {
    let (ok, found, advice) = match &ladder.program {
        Program::Loaded(_) | Program::Wire(_) | Program::Unproven => (true, "loaded".to_owned(), None),
        Program::Off => (true, "not requested".to_owned(), None),
        Program::Refused(why) => (false, format!("NOT TRIED: {why}"), None),
        Program::Failed(why) => {
            let advice = if capable {
                "check the kernel configuration (CONFIG_BPF_SYSCALL, CONFIG_BPF_STREAM_PARSER), lockdown, and \
                 what seccomp and security modules forbid"
            } else {
                "grant the capabilities listed above"
            };
            (false, format!("FAILED: {why}"), Some(advice.to_owned()))
        }
    };
    Finding { name: "program".to_owned(), ok, found, advice }
}

impl Finding {
    fn print(&self) {
        println!("{:<15}{}", self.name, self.found);
        print_advice(self.advice.as_deref());
    }
}

fn print_advice(advice: Option<&str>) {
    if let Some(advice) = advice {
        println!("{:<15}-> {advice}", "");
    }
}

fn print_path(rung: &Rung) {
    let state = match &rung.state {
        RungState::Ready => "ready".to_owned(),
        RungState::Unasked => "not requested".to_owned(),
        RungState::Off(why) => format!("OFF: {why}"),
    };
    println!("{:<15}{state}", format!("path {}", rung.path.label()));
    for check in &rung.checks {
        let Check { case, took, failure } = check;
        match failure {
            None => println!("{:<15}  ok      {case} ({})", "", milliseconds(*took)),
            Some(failure) => println!("{:<15}  FAILED  {case}: {failure}", ""),
        }
    }
    print_advice(advice(rung));
}

fn print_trials(trials: &[Trial]) {
    if !trials.is_empty() {
        println!("configuration");
    }
    for Trial { name, ok, found, advice } in trials {
        let result = if *ok { "ok    " } else { "FAILED" };
        println!("{:<15}  {result}  {name}: {found}", "");
        print_advice(advice.as_deref());
    }
}

/// Advice for failed checks; other causes are explained by the findings above.
fn advice(rung: &Rung) -> Option<&'static str> {
    let failed = rung.checks.iter().any(|check| check.failure.is_some());
    failed.then_some("the agent does not use this path and loses no byte; use another kernel to enable it")
}

fn milliseconds(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}

fn document(findings: &[Finding], ladder: &Ladder, trials: &[Trial], code: u8, verdict: &str) -> Value {
    let configuration = trials
        .iter()
        .map(|Trial { name, ok, found, advice }| json!({ "name": name, "ok": ok, "found": found, "advice": advice }));
    let machine = findings.iter().map(|finding| {
        let Finding { name, ok, found, advice } = finding;
        json!({ "name": name, "ok": ok, "found": found, "advice": advice })
    });
    let paths = ladder.rungs.iter().map(|rung| {
        let why = match &rung.state {
            RungState::Ready | RungState::Unasked => None,
            RungState::Off(why) => Some(&**why),
        };
        let checks = rung.checks.iter().map(|check| {
            json!({
                "case": check.case,
                "ok": check.failure.is_none(),
                "failure": check.failure,
                "seconds": check.took.as_secs_f64(),
            })
        });
        let checks: Vec<Value> = checks.collect();
        json!({
            "path": rung.path.label(), "ready": rung.state == RungState::Ready, "why": why, "checks": checks, "advice": advice(rung)
        })
    });
    json!({
        "exit_code": code,
        "result": verdict,
        "machine": machine.collect::<Vec<_>>(),
        "paths": paths.collect::<Vec<_>>(),
        "configuration": configuration.collect::<Vec<_>>(),
    })
}
