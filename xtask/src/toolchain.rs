//! Finds the compiler and the linker of the kernel program on this machine.
//!
//! rustup has no prebuilt `core` for `bpfel-unknown-none`. It comes from rustup's nightly with `rust-src`, which builds it, or from
//! Debian's rustc-web, which has it prebuilt. Both need bpf-linker.

use std::{path::PathBuf, process::Command};

use crate::command::{command, find, foreign, output};

/// bpf-linker's LLVM must be at least as new as that of the compiler. These versions fit rustc-web.
pub(crate) const LINKER_VERSION: &str = "0.13.0";
pub(crate) const LLVM: &str = "22";

pub(crate) const DEBIAN_PACKAGES: [&str; 7] =
    ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libzstd-dev", "zlib1g-dev", "g++"];

/// A compiler for the kernel's target.
pub(crate) enum Compiler {
    /// rustup's nightly; it builds `core` from `rust-src`. Preferred.
    Nightly,
    /// Debian's rustc-web. Called by path, because rustup's proxies may precede it on PATH.
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

    /// `cargo build` for the kernel's target.
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

/// bpf-linker, if it is installed, starts (its LLVM is a shared library) and is new enough.
pub(crate) fn linker() -> Option<PathBuf> {
    let path = find("bpf-linker")?;
    let text = output(command(&path).arg("--version"))?;
    let numbers = |text: &str| text.split('.').map_while(|part| part.parse::<u32>().ok()).collect::<Vec<_>>();
    (numbers(text.split(' ').nth(1)?) >= numbers(LINKER_VERSION)).then_some(path)
}

/// The packages that dpkg does not list as installed; all of them on a system without dpkg.
pub(crate) fn missing_packages<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    // dpkg-query fails if it does not know one of the packages, but prints the others.
    let listed = command("dpkg-query").args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(packages).output();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let installed = |package: &str| listed.lines().any(|line| line == format!("{package} installed"));
    packages.iter().copied().filter(|package| !installed(package)).collect()
}
