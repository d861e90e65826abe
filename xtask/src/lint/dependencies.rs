//! Checks dependencies against `deny.toml`: sources and bans in Cargo.lock, and the packages' licences. Needs no tool that would
//! have to be built first; `cargo deny check` reads the same file.

use std::{collections::BTreeSet, fs, process::Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use spdx::{Expression, LicenseReq};

use super::report;
use crate::command::{cargo, output, root};

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
}

/// A crate that may also have these licences.
#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    /// The crates that may depend on it.
    #[serde(default)]
    wrappers: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    /// `None` for a crate of the workspace.
    source: Option<String>,
    /// Names, some with a version after them.
    #[serde(default)]
    dependencies: Vec<String>,
}

pub(super) fn check() -> Result<()> {
    let deny: Deny = toml::from_str(&read("deny.toml")?).context("deny.toml")?;
    let lock: Lock = toml::from_str(&read("Cargo.lock")?).context("Cargo.lock")?;
    let mut findings = Vec::new();
    for package in &lock.package {
        sources(package, &mut findings);
        bans(&deny.bans, package, &mut findings);
    }
    let metadata = output(cargo().args(["metadata", "--locked", "--format-version", "1"]).stderr(Stdio::inherit()))
        .context("Cargo.lock does not match the manifests, or a package cannot be downloaded")?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        licence(&deny.licenses, name, package["license"].as_str(), &mut findings);
    }
    oldest_compiler(&mut findings)?;
    images("deploy/Dockerfile", &read("deploy/Dockerfile")?, &mut findings);
    report(&findings)
}

fn read(file: &str) -> Result<String> {
    fs::read_to_string(root().join(file)).context(file.to_owned())
}

fn sources(package: &Package, findings: &mut Vec<String>) {
    let Some(source) = &package.source else { return };
    if !source.starts_with("registry+") || !source.ends_with("/crates.io-index") {
        findings.push(format!("Cargo.lock: {} comes from {source}", package.name));
    }
}

fn bans(bans: &Bans, package: &Package, findings: &mut Vec<String>) {
    let depends_on = |ban: &Ban| package.dependencies.iter().any(|entry| entry.split(' ').next() == Some(&ban.name));
    for ban in bans.deny.iter().filter(|ban| depends_on(ban) && !ban.wrappers.contains(&package.name)) {
        findings.push(format!("Cargo.lock: {} depends on {}, which deny.toml bans", package.name, ban.name));
    }
}

fn licence(licences: &Licenses, name: &str, licence: Option<&str>, findings: &mut Vec<String>) {
    let exceptions = licences.exceptions.iter().filter(|exception| exception.name == name);
    let allowed: Vec<&String> =
        licences.allow.iter().chain(exceptions.flat_map(|exception| &exception.allow)).collect();
    let Some(licence) = licence else {
        findings.push(format!("{name} declares no licence"));
        return;
    };
    // Some packages use the old form `MIT/Apache-2.0`.
    match Expression::parse_mode(licence, spdx::ParseMode::LAX) {
        Ok(expression) => {
            let allows = |wanted: &LicenseReq| allowed.iter().any(|allowed| **allowed == wanted.to_string());
            if !expression.evaluate(allows) {
                findings.push(format!("{name} is licensed under {licence}, which deny.toml does not allow"));
            }
        }
        Err(error) => findings.push(format!("{name}: licence `{licence}`: {error}")),
    }
}

/// The oldest supported compiler is the one that the tests use.
fn oldest_compiler(findings: &mut Vec<String>) -> Result<()> {
    #[derive(Deserialize)]
    struct File {
        toolchain: Toolchain,
    }
    #[derive(Deserialize)]
    struct Toolchain {
        channel: String,
    }
    let File { toolchain } = toml::from_str(&read("rust-toolchain.toml")?).context("rust-toolchain.toml")?;
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml")?).context("Cargo.toml")?;
    let oldest =
        manifest["workspace"]["package"]["rust-version"].as_str().context("Cargo.toml names no rust-version")?;
    ensure!(!oldest.is_empty(), "Cargo.toml: rust-version is empty");
    if toolchain.channel != oldest && !toolchain.channel.starts_with(&format!("{oldest}.")) {
        findings.push(format!("Cargo.toml: rust-version {oldest}, and rust-toolchain.toml has {}", toolchain.channel));
    }
    Ok(())
}

/// A base image names a version of at least two numbers, or a digest: a shorter tag moves to other versions.
fn images(file: &str, text: &str, findings: &mut Vec<String>) {
    let mut stages = BTreeSet::from(["scratch"]);
    for words in text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
        let ["FROM", rest @ ..] = &words[..] else { continue };
        let mut rest = rest.iter().copied().skip_while(|word| word.starts_with("--"));
        let Some(image) = rest.next() else { continue };
        let tag = image.rsplit('/').next().and_then(|name| name.split_once(':')).map_or("", |(_, tag)| tag);
        let numbers = tag.split('-').next().unwrap_or_default().split('.').filter(|part| part.parse::<u32>().is_ok());
        if !stages.contains(image) && !image.contains("@sha256:") && numbers.count() < 2 {
            findings.push(format!("{file}: {image} names no full version, expected one such as rust:1.95.0-bookworm"));
        }
        // FROM image AS stage
        stages.extend(rest.nth(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, source: Option<&str>, dependencies: &[&str]) -> Package {
        Package {
            name: name.to_owned(),
            source: source.map(str::to_owned),
            dependencies: dependencies.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn image_without_a_full_version_is_found() {
        let found = |text: &str| {
            let mut findings = Vec::new();
            images("Dockerfile", text, &mut findings);
            findings.len()
        };
        for pinned in [
            "rust:1.95.0-bookworm AS build",
            "debian:12.12-slim",
            "--platform=linux/amd64 a.example:5000/b:1.2",
            "x@sha256:ab",
        ] {
            assert_eq!(found(&format!("FROM {pinned}\n")), 0, "{pinned}");
        }
        for moving in ["rust", "rust:latest", "debian:12-slim AS a", "debian:bookworm", "a.example:5000/b", "build"] {
            assert_eq!(found(&format!("FROM {moving}\nRUN x\n")), 1, "{moving}");
        }
        assert_eq!(found("FROM rust:1.95.0 AS build\nFROM build\nFROM scratch\n"), 0);
    }

    #[test]
    fn package_from_another_registry_is_found() {
        let mut findings = Vec::new();
        sources(&package("a", None, &[]), &mut findings);
        sources(&package("b", Some("registry+https://example.org/crates.io-index"), &[]), &mut findings);
        assert!(findings.is_empty(), "{findings:?}");
        sources(&package("c", Some("git+https://example.org/c"), &[]), &mut findings);
        assert_eq!(findings.len(), 1);
    }

    #[test]
    fn banned_crate_is_found_under_all_but_its_wrappers() {
        let list = Bans { deny: vec![Ban { name: "x".to_owned(), wrappers: BTreeSet::from(["w".to_owned()]) }] };
        let mut findings = Vec::new();
        bans(&list, &package("w", None, &["x"]), &mut findings);
        bans(&list, &package("a", None, &["xy", "y 1.0.0"]), &mut findings);
        assert!(findings.is_empty(), "{findings:?}");
        bans(&list, &package("a", None, &["x 1.0.0"]), &mut findings);
        assert_eq!(findings.len(), 1);
    }

    #[test]
    fn licence_that_is_not_allowed_is_found() {
        let licences = Licenses {
            allow: vec!["MIT".to_owned(), "Apache-2.0 WITH LLVM-exception".to_owned()],
            exceptions: vec![Exception { name: "f".to_owned(), allow: vec!["NCSA".to_owned()] }],
        };
        let found = |name: &str, expression: Option<&str>| {
            let mut findings = Vec::new();
            licence(&licences, name, expression, &mut findings);
            !findings.is_empty()
        };
        for allowed in ["MIT", "GPL-2.0-only OR MIT", "MIT/Apache-2.0", "MIT AND Apache-2.0 WITH LLVM-exception"] {
            assert!(!found("a", Some(allowed)), "{allowed}");
        }
        for refused in [Some("GPL-2.0-only"), Some("MIT AND NCSA"), Some("Apache-2.0"), Some("not a licence"), None] {
            assert!(found("a", refused), "{refused:?}");
        }
        assert!(!found("f", Some("MIT AND NCSA")));
    }
}
