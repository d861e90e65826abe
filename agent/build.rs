//! Finds the kernel programs for `object.rs` to take in: `target/bpf/penstock.bpf.o`, or the file that
//! `PENSTOCK_BPF_OBJECT` names, and those of path `wire`, `penstock-wire.bpf.o` in the same folder.
//!
//! With it, the cfg `penstock_bpf` is set, and `PENSTOCK_BPF_OBJECT_PATH` is its absolute path; the other object sets
//! `penstock_wire_bpf` and `PENSTOCK_WIRE_BPF_OBJECT_PATH`. Without them the agent still builds, and relays every byte in
//! user space. They come from another compiler, so cargo cannot build them as a dependency.

use std::{env, fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    println!("cargo::rustc-check-cfg=cfg(penstock_bpf)");
    println!("cargo::rustc-check-cfg=cfg(penstock_wire_bpf)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PENSTOCK_BPF_OBJECT");

    let named = env::var_os("PENSTOCK_BPF_OBJECT").map(PathBuf::from);
    let folder = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../target/bpf");
    let object = named.clone().unwrap_or_else(|| folder.join("penstock.bpf.o"));

    if let Ok(path) = fs::canonicalize(object.with_file_name("penstock-wire.bpf.o")) {
        println!("cargo::rerun-if-changed={}", path.display());
        println!("cargo::rustc-cfg=penstock_wire_bpf");
        println!("cargo::rustc-env=PENSTOCK_WIRE_BPF_OBJECT_PATH={}", path.display());
    }
    if let Ok(path) = fs::canonicalize(&object) {
        println!("cargo::rerun-if-changed={}", path.display());
        println!("cargo::rustc-cfg=penstock_bpf");
        println!("cargo::rustc-env=PENSTOCK_BPF_OBJECT_PATH={}", path.display());
        return ExitCode::SUCCESS;
    }
    if named.is_some() {
        println!("cargo::error=PENSTOCK_BPF_OBJECT names {}, and there is no such file", object.display());
        return ExitCode::FAILURE;
    }

    // A file that is not there counts as changed in every build; a folder only when something appears in it.
    let watched = if fs::create_dir_all(&folder).is_ok() { folder } else { object };
    println!("cargo::rerun-if-changed={}", watched.display());
    println!(
        "cargo::warning=no kernel program at target/bpf/penstock.bpf.o: this build of penstock can only relay. It needs a \
         compiler for the kernel's target, which rustup does not have ready: `cargo xtask setup`, then `cargo xtask build-ebpf`"
    );
    ExitCode::SUCCESS
}
