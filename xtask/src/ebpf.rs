//! `cargo xtask build-ebpf`: the kernel program, built for the kernel's target into `target/bpf/penstock.bpf.o`, from where
//! the agent's build takes it in.
//!
//! The object is replaced only when its content changed, so the agent is not built again for nothing.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::{
    command::{root, run},
    setup,
    toolchain::{Compiler, linker},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail where a tool is missing instead of installing it
    #[arg(long)]
    no_setup: bool,
}

#[derive(Clone, Copy)]
pub(crate) enum Warnings {
    Allow,
    Deny,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    if args.no_setup && (Compiler::find().is_none() || linker().is_none()) {
        bail!("the tools for the kernel program are missing: `cargo xtask setup --check` says which");
    }
    build(Warnings::Allow)
}

/// Sets up what is missing, then builds.
pub(crate) fn build(warnings: Warnings) -> Result<()> {
    if Compiler::find().is_none() || linker().is_none() {
        setup::kernel_build()?;
    }
    let (Some(compiler), Some(linker)) = (Compiler::find(), linker()) else {
        bail!("the tools for the kernel program are still missing after setup");
    };

    let target = root().join("target/ebpf");
    let linker = format!("linker={}", linker.display());
    // The target's own flags: with --target, cargo does not pass them to build scripts and procedural macros.
    let flags = ["-C", "target-cpu=v3", "-C", "debuginfo=2", "-C", &linker, "-C", "link-arg=--btf"];
    let mut cargo = compiler.cargo_build();
    cargo.args(["--release", "--package", "penstock-ebpf", "--target-dir"]).arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    if let Warnings::Deny = warnings {
        // Unlike `-D warnings` among the flags, this builds nothing anew.
        cargo.args(["-Z", "warnings", "--config", "build.warnings='deny'"]);
    }
    run(&mut cargo)?;

    install(&target.join("bpfel-unknown-none/release/penstock-ebpf"))
}

fn install(built: &Path) -> Result<()> {
    let object = root().join("target/bpf/penstock.bpf.o");
    let content = fs::read(built).with_context(|| format!("reading {}", built.display()))?;
    if !content.windows(5).any(|name| name == b".BTF\0") {
        bail!("{} has no BTF, which the kernel asks for: was it linked by bpf-linker with --btf?", built.display());
    }
    let unchanged = fs::read(&object).is_ok_and(|old| old == content);
    if !unchanged {
        fs::create_dir_all(object.parent().expect("the object is in a folder"))?;
        // By rename, so that a build of the agent at the same time never sees half of it.
        let new = object.with_extension("new");
        fs::write(&new, &content)?;
        fs::rename(&new, &object)?;
    }
    let state = if unchanged { "unchanged" } else { "new" };
    eprintln!("build-ebpf: target/bpf/penstock.bpf.o, {} bytes, {state}", content.len());
    Ok(())
}
