//! `penstock doctor`: what this machine lets the agent do.

use std::{path::Path, process::ExitCode, sync::Arc};

use penstock_agent::{
    kernel::{Kernel, slots::Lane, version},
    selftest,
};

/// Prints each check with its result and what to do about it; fails when the agent could only relay.
pub(crate) fn run() -> ExitCode {
    let release = version::release();
    let sound = version::is_sound(&release);
    println!(
        "kernel        {release}{}",
        if sound {
            ""
        } else {
            ": KNOWN to lose or repeat bytes in sockmap; take 6.1.142, 6.6.94, 6.12.34, 6.16 or newer"
        }
    );
    println!("capabilities  {}", capabilities());
    let btf = Path::new("/sys/kernel/btf/vmlinux");
    println!(
        "btf           {}",
        if btf.exists() { "present" } else { "MISSING: the kernel needs CONFIG_DEBUG_INFO_BTF" }
    );
    let kernel = match Kernel::load(64) {
        Ok(kernel) => Arc::new(kernel),
        Err(error) => {
            println!("program       FAILED: {error}");
            println!("steering      unavailable: the agent relays every byte in user space");
            return ExitCode::FAILURE;
        }
    };
    println!("program       loaded");
    match selftest::prove(&kernel, Lane::Ingress) {
        Ok(()) if !sound => {
            println!("self-test     passed, but it cannot show the absence of rare races");
            println!("steering      unavailable: the agent relays every byte in user space");
            ExitCode::FAILURE
        }
        Ok(()) => {
            println!("self-test     passed (ingress path: room gate, chunked stream, end by FIN)");
            println!("steering      available (ingress)");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("self-test     FAILED: {error:#}");
            println!("steering      unavailable: this kernel loses or reorders bytes; the agent relays");
            ExitCode::FAILURE
        }
    }
}

/// Which of the capabilities that loading takes this process has (effective set, /proc/self/status).
fn capabilities() -> String {
    const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or_default();
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(_, bit)| effective >> bit & 1 == 0).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        "CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON".into()
    } else {
        format!("MISSING {}", missing.join(", "))
    }
}
