//! The verbs of the project, for people and for CI alike: `cargo xtask VERB`.
//!
//! This file lists them; each has its own. What several verbs need stands below them: how the kernel program can be
//! built on this machine (`toolchain`), how commands are made (`command`), how what is to be fast is built (`optimised`),
//! how long work is shown (`progress`), and how tests are repeated (`repeat`).

mod demo;
mod fuzz;
mod lint;
mod posts;
mod release;
mod run;
mod soak;
mod stress;
mod test;
mod vm;

mod ebpf;
mod setup;

mod command;
mod optimised;
mod progress;
mod repeat;
mod toolchain;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about, disable_help_subcommand = true)]
enum Verb {
    /// Install what building the kernel program needs; does nothing where it is all there
    Setup(setup::Args),
    /// Build the kernel program into target/bpf/penstock.bpf.o
    BuildEbpf(ebpf::Args),
    /// Build everything and start the agent: cargo xtask run -- --config FILE
    Run(run::Args),
    /// Build what the demo needs and start it: cargo xtask demo -- ARGUMENTS
    Demo(demo::Args),
    /// Build what the stress run needs and start it: cargo xtask stress --seconds 600
    Stress(stress::Args),
    /// Build what the soak run needs and start it: cargo xtask soak --minutes 30
    Soak(soak::Args),
    /// Run the fuzz targets one after the other: cargo xtask fuzz --seconds 60
    Fuzz(fuzz::Args),
    /// Install what is missing, build, and POST into real servers on each mode: cargo xtask posts --server nginx
    Posts(posts::Args),
    /// Install what is missing, build everything, run every test
    Test(test::Args),
    /// Run the tests of the kernel's part on other kernels, in virtual machines
    VmTest(vm::Args),
    /// Check formatting, the rules of the house, dependencies, warnings, documentation links and clippy
    Lint,
    /// Prepare the commit of a release: cargo xtask release 0.2.0 --dry-run
    Release(release::Args),
}

fn main() -> ExitCode {
    if let Err(error) = fuzz::become_compiler() {
        eprintln!("xtask: {error:#}");
        return ExitCode::FAILURE;
    }
    let done = match Verb::parse() {
        Verb::Setup(args) => setup::main(&args),
        Verb::BuildEbpf(args) => ebpf::main(&args),
        Verb::Run(args) => run::main(&args),
        Verb::Demo(args) => demo::main(&args),
        Verb::Stress(args) => stress::main(&args),
        Verb::Soak(args) => soak::main(&args),
        Verb::Fuzz(args) => fuzz::main(&args),
        Verb::Posts(args) => posts::main(&args),
        Verb::Test(args) => test::main(&args),
        Verb::VmTest(args) => vm::main(&args),
        Verb::Lint => lint::main(),
        Verb::Release(args) => release::main(&args),
    };
    if let Err(error) = done {
        // In one line: where in xtask it came from helps nobody.
        eprintln!("xtask: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
