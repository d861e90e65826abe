//! The profile `demo`: optimised where it matters, and built in a few minutes. For the verbs that start the tests' programs.

use std::process::Command;

use anyhow::Result;

use crate::{
    command::{cargo, run},
    ebpf,
};

const PROFILE: [&str; 2] = ["--profile", "demo"];

/// The kernel program, the agent, and the programs that test it.
pub(crate) fn build() -> Result<()> {
    ebpf::build(ebpf::Warnings::Allow)?;
    let packages = ["--package", "penstock-agent", "--package", "penstock-tests", "--bins"];
    run(cargo().arg("build").args(PROFILE).args(packages))
}

/// A program of the tests, as it was built; its arguments are still to come.
pub(crate) fn program(name: &str) -> Command {
    let mut program = cargo();
    program.args(["run", "--quiet"]).args(PROFILE).args(["--package", "penstock-tests", "--bin", name, "--"]);
    program
}
