//! Builds with the profile `demo`, which optimises what is measured and takes a few minutes. For commands that start programs of
//! `penstock-tests`.

use std::process::Command;

use anyhow::Result;

use crate::{
    command::{cargo, run},
    ebpf,
};

const PROFILE: [&str; 2] = ["--profile", "demo"];

/// Builds the kernel program, the agent, and the programs of `penstock-tests`.
pub(crate) fn build() -> Result<()> {
    ebpf::build(ebpf::Warnings::Allow)?;
    let packages = ["--package", "penstock-agent", "--package", "penstock-tests", "--bins"];
    run(cargo().arg("build").args(PROFILE).args(packages))
}

/// A program of `penstock-tests` without arguments.
pub(crate) fn program(name: &str) -> Command {
    let mut program = cargo();
    program.args(["run", "--quiet"]).args(PROFILE).args(["--package", "penstock-tests", "--bin", name, "--"]);
    program
}
