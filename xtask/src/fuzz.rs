//! `cargo xtask fuzz --seconds N`: builds the fuzz targets for libFuzzer and runs each for so long, one after the other.
//!
//! The compiler is the one that builds the agent: what libFuzzer needs of it (`-C passes=sancov-module` and LLVM's options for
//! it) is stable, so neither nightly nor cargo-fuzz is needed. Only the workspace's own crates are instrumented, so every dependency
//! is shared with the other debug builds: cargo calls this program instead of rustc for them. Inputs are taken from `fuzz/corpus/TARGET`; what a run adds stays
//! in `target/fuzz`, and `--merge` takes from there what reaches more code. An input that breaks a promise is in
//! `target/fuzz/findings`.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    command::{cargo, output, root, run},
    ebpf,
    progress::Steps,
};

/// As cargo-fuzz sets them, without a sanitizer: the code under test is safe Rust.
const COVERAGE: [&str; 11] = [
    "--cfg",
    "fuzzing",
    "-C",
    "passes=sancov-module",
    "-C",
    "llvm-args=-sanitizer-coverage-level=4",
    "-C",
    "llvm-args=-sanitizer-coverage-inline-8bit-counters -sanitizer-coverage-pc-table -sanitizer-coverage-trace-compares",
    "-C",
    "debug-assertions",
    "--cap-lints=allow",
];
/// Set for cargo when this program is the compiler that it calls for the workspace's crates.
const COMPILER: &str = "PENSTOCK_FUZZ_COMPILER";
/// Crates that are more than glue are optimised.
const OPTIMISED: [&str; 3] = ["penstock-agent", "penstock-common", "penstock-fuzz"];
/// Longest input that is tried, bytes.
const MOST_INPUT: &str = "-max_len=4096";
/// An input that takes longer is a finding, seconds.
const PATIENCE: &str = "-timeout=30";
/// What the process may hold, MiB.
const MEMORY: &str = "-rss_limit_mb=2048";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only these; all by default
    #[arg(long)]
    target: Vec<String>,
    /// Instead of fuzzing: take the new inputs that reach more code into fuzz/corpus
    #[arg(long)]
    merge: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = args.target.iter().find(|target| !all.contains(target)) {
        bail!("no target {unknown}; there are {}", all.join(", "));
    }
    let mut steps = Steps::default();
    let folder = steps.step("build", build)?;
    let mut failed = Vec::new();
    for target in all.iter().filter(|target| args.target.is_empty() || args.target.contains(target)) {
        eprintln!("== {target}");
        let program = folder.join(target);
        let done = if args.merge { merge(&program, target) } else { fuzz(&program, target, args.seconds) };
        // One finding is no reason to know nothing of the other targets.
        if let Err(error) = done {
            failed.push(format!("{target}: {error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// The names of the programs in `fuzz/fuzz_targets`.
fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for file in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = file?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a target with a name")?;
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

/// The folder of the programs.
fn build() -> Result<PathBuf> {
    ebpf::build(ebpf::Warnings::Allow)?;
    let mut build = cargo();
    build.args(["build", "--features", "penstock-fuzz/libfuzzer"]);
    for target in targets()? {
        build.args(["--bin", &target]);
    }
    for package in OPTIMISED {
        build.args(["--config", &format!("profile.dev.package.{package}.opt-level=1")]);
    }
    build.env("RUSTC_WORKSPACE_WRAPPER", env::current_exe()?).env(COMPILER, "1");
    run(&mut build)?;
    Ok(root().join("target/debug"))
}

/// When cargo has called this program instead of rustc: becomes rustc, with what libFuzzer needs, and does not return.
pub(crate) fn become_compiler() -> Result<()> {
    if env::var_os(COMPILER).is_none() {
        return Ok(());
    }
    let mut arguments = env::args_os().skip(1);
    let mut rustc = Command::new(arguments.next().context("no compiler is named")?);
    let arguments: Vec<OsString> = arguments.collect();
    // Build scripts run here, without libFuzzer; without a name, cargo asks what the compiler can do.
    let name = arguments.windows(2).find(|pair| pair[0] == "--crate-name").map(|pair| &pair[1]);
    if name.is_some_and(|name| name != "build_script_build" && name != "___") {
        rustc.args(COVERAGE);
    }
    Err(rustc.args(arguments).exec()).context("starting the compiler")
}

fn fuzz(program: &Path, target: &str, seconds: u64) -> Result<()> {
    let (new, findings) = (folder("corpus", target)?, folder("findings", target)?);
    let mut command = libfuzzer(program);
    command.args([&format!("-max_total_time={seconds}"), "-print_final_stats=1", PATIENCE, MEMORY]);
    // The first folder takes what is found.
    command.arg(format!("-artifact_prefix={}/", findings.display())).arg(new).arg(kept(target));
    run(&mut command)
}

fn merge(program: &Path, target: &str) -> Result<()> {
    run(libfuzzer(program).arg("-set_cover_merge=1").arg(kept(target)).arg(folder("corpus", target)?))
}

fn libfuzzer(program: &Path) -> std::process::Command {
    let mut command = crate::command::command(program);
    command.arg(MOST_INPUT);
    // Coverage tells where a finding is; the agent's log does not.
    command.env("RUST_BACKTRACE", env::var_os("RUST_BACKTRACE").unwrap_or_else(|| "1".into()));
    command
}

fn kept(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

fn folder(of: &str, target: &str) -> Result<PathBuf> {
    let folder = root().join("target/fuzz").join(of).join(target);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}
