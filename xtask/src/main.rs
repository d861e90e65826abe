//! The project's commands, for people and CI: `cargo xtask COMMAND`.
//!
//! Each command has a file. Shared parts: `toolchain` finds the compiler of the kernel program, `command` makes and runs processes,
//! `optimised` builds fast programs, `progress` shows long work, `repeat` repeats tests.

mod bench;
mod book;
mod demo;
mod fuzz;
mod lint;
mod manifests;
mod picture;
mod posts;
mod release;
mod run;
mod settings;
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
    /// Install what building the kernel program needs, if it is missing
    Setup(setup::Args),
    /// Build the kernel program into target/bpf/penstock.bpf.o
    BuildEbpf(ebpf::Args),
    /// Build everything and start the agent: cargo xtask run -- --config FILE
    Run(run::Args),
    /// Build and start the demo: cargo xtask demo -- ARGUMENTS
    Demo(demo::Args),
    /// Measure the agent, Envoy and nginx under the same loads: cargo xtask bench --quick
    Bench(bench::Args),
    /// Build and start the stress run: cargo xtask stress --seconds 600
    Stress(stress::Args),
    /// Build and start the soak run: cargo xtask soak --minutes 30
    Soak(soak::Args),
    /// Run the fuzz targets in sequence: cargo xtask fuzz --seconds 60
    Fuzz(fuzz::Args),
    /// Send POSTs to real servers in each steering mode: cargo xtask posts --server nginx
    Posts(posts::Args),
    /// Install what is missing, build everything, run every test
    Test(test::Args),
    /// Run the kernel tests on other kernels, in virtual machines
    VmTest(vm::Args),
    /// Write the references of settings, log fields and metrics, and the JSON Schemas, from their declarations
    Settings,
    /// Render deploy/kubernetes and the schema of the chart's values
    Manifests(manifests::Args),
    /// Build docs/ as a book into target/book/html, and check its links
    Book,
    /// Draw docs/byte-path.svg
    Picture,
    /// Check formatting, project rules, dependencies, warnings, documentation, the book and clippy
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
        Verb::Bench(args) => bench::main(&args),
        Verb::Stress(args) => stress::main(&args),
        Verb::Soak(args) => soak::main(&args),
        Verb::Fuzz(args) => fuzz::main(&args),
        Verb::Posts(args) => posts::main(&args),
        Verb::Test(args) => test::main(&args),
        Verb::VmTest(args) => vm::main(&args),
        Verb::Settings => settings::main(),
        Verb::Manifests(args) => manifests::main(&args),
        Verb::Book => book::main(),
        Verb::Picture => picture::main(),
        Verb::Lint => lint::main(),
        Verb::Release(args) => release::main(&args),
    };
    if let Err(error) = done {
        eprintln!("xtask: {error:#}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
