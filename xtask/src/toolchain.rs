//! What this machine has for building the kernel program, and what it lacks.
//!
//! The target `bpfel-unknown-none` comes without a prebuilt `core` from rustup. Two ways lead to one: rustup's nightly
//! with `rust-src`, from which `core` is built, or Debian's rustc-web with its prebuilt one. Each needs bpf-linker.

use std::{path::PathBuf, process::Command};

use crate::command::{command, find, foreign, output};

/// bpf-linker's LLVM must be at least the one of the rustc whose bitcode it reads; these go together with rustc-web.
pub(crate) const LINKER_VERSION: &str = "0.13.0";
pub(crate) const LLVM: &str = "22";

pub(crate) const DEBIAN_PACKAGES: [&str; 7] =
    ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libzstd-dev", "zlib1g-dev", "g++"];

/// A compiler that makes bitcode for the kernel.
pub(crate) enum Compiler {
    /// Way A: rustup's nightly; `core` is built from its `rust-src`.
    Nightly,
    /// Way B: Debian's. rustup's proxies stand before these two on PATH, so they are called by their paths.
    Debian { rustc: PathBuf, cargo: PathBuf },
}

impl Compiler {
    pub(crate) fn find() -> Option<Self> {
        Self::nightly().or_else(Self::debian)
    }

    fn nightly() -> Option<Self> {
        let sysroot = output(foreign("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
        PathBuf::from(sysroot).join("lib/rustlib/src/rust/library/core").is_dir().then_some(Self::Nightly)
    }

    fn debian() -> Option<Self> {
        if !missing_packages(&DEBIAN_PACKAGES).is_empty() {
            return None;
        }
        let files = output(command("dpkg").args(["-L", "rustc-web", "cargo-web"]))?;
        let program =
            |name: &str| files.lines().map(PathBuf::from).find(|path| path.ends_with(format!("usr/bin/{name}")));
        Some(Self::Debian { rustc: program("rustc")?, cargo: program("cargo")? })
    }

    /// `cargo build`, for the kernel's target.
    pub(crate) fn cargo_build(&self) -> Command {
        let mut cargo = match self {
            Self::Nightly => {
                let mut cargo = foreign("rustup");
                cargo.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
                cargo
            }
            Self::Debian { rustc, cargo } => {
                let mut cargo = foreign(cargo);
                // aya-ebpf turns on unstable features.
                cargo.arg("build").env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                cargo
            }
        };
        cargo.args(["--target", "bpfel-unknown-none"]);
        cargo
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Nightly => "rustup's nightly with rust-src",
            Self::Debian { .. } => "Debian's rustc-web",
        }
    }
}

/// bpf-linker, if it is there, starts (its LLVM is a shared library) and is not too old.
pub(crate) fn linker() -> Option<PathBuf> {
    let path = find("bpf-linker")?;
    let text = output(command(&path).arg("--version"))?;
    let numbers = |text: &str| text.split('.').map_while(|part| part.parse::<u32>().ok()).collect::<Vec<_>>();
    (numbers(text.split(' ').nth(1)?) >= numbers(LINKER_VERSION)).then_some(path)
}

/// Those of the packages that Debian's package database does not list as installed; all, where there is no such database.
pub(crate) fn missing_packages<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    // dpkg-query fails when one of the packages is unknown to it, and prints the others all the same.
    let listed = command("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(packages).output();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let installed = |package: &str| listed.lines().any(|line| line == format!("{package} installed"));
    packages.iter().copied().filter(|package| !installed(package)).collect()
}
