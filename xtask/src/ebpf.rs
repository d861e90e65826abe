//! `cargo xtask build-ebpf`: builds the kernel programs into `target/bpf/`, from where the agent's build embeds them.
//!
//! An object is replaced only if its content changed, so that the agent is not rebuilt needlessly.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use crate::{
    command::{root, run},
    setup,
    toolchain::{Compiler, linker},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail if a tool is missing instead of installing it
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

/// Installs missing tools, then builds.
pub(crate) fn build(warnings: Warnings) -> Result<()> {
    if Compiler::find().is_none() || linker().is_none() {
        setup::kernel_build()?;
    }
    let (Some(compiler), Some(linker)) = (Compiler::find(), linker()) else {
        bail!("the tools for the kernel program are still missing after setup");
    };

    let target = root().join("target/ebpf");
    let linker = format!("linker={}", linker.display());
    // With --target, cargo does not pass these flags to build scripts and procedural macros.
    let flags = ["-C", "target-cpu=v3", "-C", "debuginfo=2", "-C", &linker, "-C", "link-arg=--btf"];
    let mut cargo = compiler.cargo_build();
    cargo.args(["--release", "--package", "penstock-ebpf", "--target-dir"]).arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // The profile is made for the agent. bpf-linker links and optimises the program as a whole itself.
    cargo.env("CARGO_PROFILE_RELEASE_LTO", "false").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    if let Warnings::Deny = warnings {
        // Unlike `-D warnings` among the flags, this rebuilds nothing.
        cargo.args(["-Z", "warnings", "--config", "build.warnings='deny'"]);
    }
    run(&mut cargo)?;

    let built = target.join("bpfel-unknown-none/release");
    install(&built.join("penstock-ebpf"), "penstock.bpf.o")?;
    install(&built.join("penstock-wire"), "penstock-wire.bpf.o")
}

fn install(built: &Path, name: &str) -> Result<()> {
    let object = root().join("target/bpf").join(name);
    let content = fs::read(built).with_context(|| format!("reading {}", built.display()))?;
    if !content.windows(5).any(|name| name == b".BTF\0") {
        bail!("{} has no BTF, which the kernel requires: was it linked by bpf-linker with --btf?", built.display());
    }
    let unchanged = fs::read(&object).is_ok_and(|old| old == content);
    if !unchanged {
        fs::create_dir_all(object.parent().expect("the object has a folder"))?;
        // A rename is atomic: a concurrent build of the agent never sees half of the object.
        let new = object.with_extension("new");
        fs::write(&new, &content)?;
        fs::rename(&new, &object)?;
    }
    let state = if unchanged { "unchanged" } else { "new" };
    eprintln!("build-ebpf: target/bpf/{name}, {} bytes, {state}", content.len());
    Ok(())
}
