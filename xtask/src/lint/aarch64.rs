//! Checks that the agent also compiles for aarch64, which the machines of CI are not, and without its features.
//!
//! clippy checks the agent, and the C code of its crates (ring, mimalloc) is compiled. Nothing is linked or run.
//! The feature `kubernetes` is left out, because its crates take long and nothing in them depends on the processor. The kernel programs
//! need no check of their own: their object is for the BPF machine, the same on x86_64 and aarch64.

use anyhow::Result;

use crate::{
    command::{cargo, run},
    setup,
};

pub(super) fn check() -> Result<()> {
    setup::aarch64_needs()?;
    let agent = ["--package", "penstock-agent", "--no-default-features", "--bins", "--target", setup::AARCH64];
    run(cargo().arg("clippy").args(agent).args(["--", "-D", "warnings"]))
}
