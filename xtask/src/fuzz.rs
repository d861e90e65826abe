//! `cargo xtask fuzz --seconds N`: builds the fuzz targets for libFuzzer with the agent's compiler, and runs them, one on each core.
//!
//! Only the workspace's crates are instrumented, so dependencies are shared with other debug builds: cargo calls this program
//! instead of rustc for those crates. Inputs come from `fuzz/corpus/TARGET`; a run adds new ones to `target/fuzz`, from where
//! `--merge` copies those that reach more code. Failing inputs are in `target/fuzz/findings`.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    command::{cargo, root, run},
    ebpf,
    progress::{Steps, quietly, watch},
};

/// The flags of cargo-fuzz, without a sanitizer: the code under test is safe Rust. All of them are stable.
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
/// Set in cargo's environment when it calls this program as the compiler of the workspace's crates.
const COMPILER: &str = "PENSTOCK_FUZZ_COMPILER";
/// Optimised packages: those with the code under test.
const OPTIMISED: [&str; 3] = ["penstock-agent", "penstock-common", "penstock-fuzz"];
/// The longest input, in bytes.
const MOST_INPUT: &str = "-max_len=4096";
/// An input that takes longer than this many seconds is a finding.
const PATIENCE: &str = "-timeout=30";
/// Memory limit of the process, in MiB.
const MEMORY: &str = "-rss_limit_mb=2048";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Time for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Instead of a time, a number of inputs for each target, the same ones in each run of the same build
    #[arg(long, conflicts_with = "seconds")]
    inputs: Option<u64>,
    /// How many targets run at once; as many as there are cores by default
    #[arg(long)]
    jobs: Option<usize>,
    /// Run only these targets; all by default
    #[arg(long)]
    target: Vec<String>,
    /// Instead of fuzzing, copy new inputs that reach more code to fuzz/corpus
    #[arg(long)]
    merge: bool,
}

impl Args {
    /// libFuzzer's flags for how long it runs.
    fn length(&self) -> Vec<String> {
        match self.inputs {
            Some(inputs) => vec![format!("-runs={inputs}"), "-seed=1".to_owned()],
            None => vec![format!("-max_total_time={}", self.seconds)],
        }
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = args.target.iter().find(|target| !all.contains(target)) {
        bail!("no fuzz target {unknown}: expected one of {}", all.join(", "));
    }
    let mut steps = Steps::default();
    let folder = steps.step("build", build)?;
    let targets: Vec<String> =
        all.into_iter().filter(|target| args.target.is_empty() || args.target.contains(target)).collect();
    let jobs = args.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let failed = each(&targets, jobs, |target| {
        let program = folder.join(target);
        if args.merge { merge(&program, target) } else { fuzz(&program, target, args.length()) }
    });
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Does `work` for each target, for `jobs` of them at once, and returns what failed. The others run after a failure too.
fn each(targets: &[String], jobs: usize, work: impl Fn(&str) -> Result<()> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut failed = Vec::new();
        while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = work(target) {
                failed.push(format!("{target}: {error:#}"));
            }
        }
        failed
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a worker panics with its target's output"))
            .collect()
    })
}

/// The names of the programs in `fuzz/fuzz_targets`.
fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/fuzz_targets");
    let mut names = Vec::new();
    for file in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = file?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a target has no name")?;
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

/// Builds the programs; returns their folder.
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

/// If cargo called this program instead of rustc, replaces it by rustc with libFuzzer's flags and does not return.
pub(crate) fn become_compiler() -> Result<()> {
    if env::var_os(COMPILER).is_none() {
        return Ok(());
    }
    let mut arguments = env::args_os().skip(1);
    let mut rustc = Command::new(arguments.next().context("cargo named no compiler")?);
    let arguments: Vec<OsString> = arguments.collect();
    // Build scripts run without libFuzzer. Without a crate name, cargo queries the compiler.
    let name = arguments.windows(2).find(|pair| pair[0] == "--crate-name").map(|pair| &pair[1]);
    if name.is_some_and(|name| name != "build_script_build" && name != "___") {
        rustc.args(COVERAGE);
    }
    Err(rustc.args(arguments).exec()).context("starting the compiler")
}

fn fuzz(program: &Path, target: &str, length: Vec<String>) -> Result<()> {
    let (new, findings) = (folder("corpus", target)?, folder("findings", target)?);
    let mut command = libfuzzer(program);
    command.args(length).args(["-print_final_stats=1", PATIENCE, MEMORY]);
    // libFuzzer writes new inputs to the first folder.
    command.arg(format!("-artifact_prefix={}/", findings.display())).arg(new).arg(corpus(target));
    let lines = watch(target, &mut command)?;
    let inputs = lines.iter().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    eprintln!("{target}: {} inputs", inputs.context("libFuzzer printed no number of inputs")?.trim());
    Ok(())
}

fn merge(program: &Path, target: &str) -> Result<()> {
    quietly(target, libfuzzer(program).arg("-set_cover_merge=1").arg(corpus(target)).arg(folder("corpus", target)?))
}

fn libfuzzer(program: &Path) -> std::process::Command {
    let mut command = crate::command::command(program);
    command.arg(MOST_INPUT);
    // A finding needs a backtrace.
    command.env("RUST_BACKTRACE", env::var_os("RUST_BACKTRACE").unwrap_or_else(|| "1".into()));
    command
}

fn corpus(target: &str) -> PathBuf {
    root().join("fuzz/corpus").join(target)
}

fn folder(of: &str, target: &str) -> Result<PathBuf> {
    let folder = root().join("target/fuzz").join(of).join(target);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_is_run_once_and_failures_do_not_stop_others() {
        let targets: Vec<String> = (0..7).map(|number| format!("target{number}")).collect();
        let runs = AtomicUsize::new(0);
        let mut failed = each(&targets, 3, |target| {
            runs.fetch_add(1, Ordering::Relaxed);
            ensure!(!target.ends_with(['2', '5']), "a finding");
            Ok(())
        });
        failed.sort();
        assert_eq!(runs.into_inner(), 7);
        assert_eq!(failed, ["target2: a finding", "target5: a finding"]);
    }
}
