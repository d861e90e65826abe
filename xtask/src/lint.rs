//! `cargo xtask lint`: formatting, clippy, warnings of the kernel program, and the rules of the house that no compiler knows.
//!
//! The rules look at tracked files. Every finding is printed as `file:line: what`, then the verb fails.

mod links;

use std::fs;

use anyhow::{Context, Result, bail};

use crate::{
    command::{cargo, command, find, output, root, run},
    ebpf,
    progress::Steps,
};

/// Longer files usually have two nouns in them: a warning, not a failure.
const LONG_FILE: usize = 500;

/// Split, so that this file does not break its own rules.
const NEVER_IN_RUST: [&str; 4] =
    [concat!("#[", "ignore"), concat!("#[", "should_panic"), concat!("to", "do!("), concat!("unimple", "mented!(")];
const UNSAFE: &str = concat!("un", "safe");
const UNSAFE_PLACES: [&str; 5] = [
    "agent-ebpf/",
    "common/",
    "agent/src/kernel.rs",
    "agent/src/kernel/",
    // tokio has no safe way to register a timer.
    "tests/src/model_server/pacer.rs",
];
/// Where a clone of this repository is, and where packages come from, is its user's business.
const NEVER_IN_TEXT: [&str; 7] = [
    concat!("/wo", "rk/"),
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("pypi", ".org"),
    concat!("index.crates", ".io"),
    concat!("deb.debian", ".org"),
    concat!("registry.npmjs", ".org"),
];

pub(crate) fn main() -> Result<()> {
    let mut steps = Steps::default();
    // Each is run even when one before it has failed, so that all there is to mend is seen at once.
    let results = [
        steps.step("formatting", || run(cargo().args(["fmt", "--all", "--check"]))),
        steps.step("rules of the house", rules),
        steps.step("dependencies", dependencies),
        steps.step("kernel program without warnings", || ebpf::build(ebpf::Warnings::Deny)),
        steps.step("clippy", || run(cargo().args(["clippy", "--all-targets", "--", "-D", "warnings"]))),
    ];
    let errors: Vec<String> = results.into_iter().filter_map(|result| Some(format!("{:#}", result.err()?))).collect();
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    Ok(())
}

fn rules() -> Result<()> {
    let files = output(command("git").args(["ls-files"])).context("listing the tracked files with git")?;
    let mut findings = Vec::new();
    for file in files.lines().filter(|file| *file != "Cargo.lock" && !file.starts_with("fuzz/corpus/")) {
        // Deleted and not yet committed, or not text: nothing to look at.
        let Ok(text) = fs::read_to_string(root().join(file)) else { continue };
        look_at(file, &text, &mut findings);
        if file.ends_with(".md") {
            links::look_at(root(), file, &text, &mut findings);
        }
    }
    report(&findings)
}

fn look_at(file: &str, text: &str, findings: &mut Vec<String>) {
    let rust = file.ends_with(".rs");
    let may_be_unsafe = UNSAFE_PLACES.iter().any(|place| file.starts_with(place));
    for (line, number) in text.lines().zip(1..) {
        let mut found = |what: String| findings.push(format!("{file}:{number}: {what}"));
        if line.ends_with([' ', '\t']) {
            found("white space at the end of the line".to_owned());
        }
        for never in NEVER_IN_TEXT.into_iter().filter(|never| stands_alone(line, never)) {
            found(format!("`{never}`: a path of one machine or a registry's host"));
        }
        if rust {
            for never in NEVER_IN_RUST.into_iter().filter(|never| line.contains(never)) {
                found(format!("`{never}`: a test runs, and code is there or is not"));
            }
            if !may_be_unsafe && has_unsafe(line) {
                found(format!("`{UNSAFE}` belongs in {}", UNSAFE_PLACES.join(", ")));
            }
        }
    }
    let lines = text.lines().count();
    if rust && lines > LONG_FILE {
        eprintln!("warning: {file} has {lines} lines: two nouns?");
    }
}

/// Whether the text occurs other than within a longer path or name.
fn stands_alone(line: &str, text: &str) -> bool {
    let in_a_name = |before: char| before.is_alphanumeric() || "._-".contains(before);
    line.match_indices(text).any(|(at, _)| !line[..at].ends_with(in_a_name))
}

/// Whether the keyword stands in the line's code: not in a comment, and not as a part of a lint's name.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == UNSAFE)
}

/// `deny.toml`'s bans and sources, held against Cargo.lock without another tool; licences too where cargo-deny is there.
fn dependencies() -> Result<()> {
    run(cargo()
        .args(["metadata", "--locked", "--format-version", "1", "--no-deps"])
        .stdout(std::process::Stdio::null()))
    .context("Cargo.lock does not fit the manifests")?;
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    let deny = fs::read_to_string(root().join("deny.toml")).context("deny.toml")?;

    let mut findings = Vec::new();
    for package in lock.split("[[package]]").skip(1) {
        let name = quoted(package, "name = ").first().copied().unwrap_or_default();
        for source in quoted(package, "source = ") {
            if !source.starts_with("registry+") || !source.ends_with("/crates.io-index") {
                findings.push(format!("Cargo.lock: {name} comes from {source}"));
            }
        }
        let dependencies = package.split_once("dependencies = [").map_or("", |(_, list)| list);
        for ban in deny.lines().map(str::trim).filter(|line| line.starts_with("{ crate = ")) {
            let names = quoted(ban, "");
            let (banned, wrappers) = (names[0], ban.split_once("wrappers = [").map_or("", |(_, list)| list));
            let depends = quoted(dependencies, "").iter().any(|entry| entry.split(' ').next() == Some(banned));
            if depends && !quoted(wrappers, "").contains(&name) {
                findings.push(format!("Cargo.lock: {name} depends on {banned}, which deny.toml bans"));
            }
        }
    }
    report(&findings)?;

    if find("cargo-deny").is_some() {
        return run(cargo().args(["deny", "check", "bans", "licenses", "sources"]));
    }
    eprintln!("cargo-deny is not installed: bans and sources checked, licences not");
    Ok(())
}

/// The strings in quotes on the lines that start so.
fn quoted<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    let lines = text.lines().map(str::trim).filter(|line| line.starts_with(start));
    lines.flat_map(|line| line.split('"').skip(1).step_by(2)).collect()
}

fn report(findings: &[String]) -> Result<()> {
    for finding in findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings", findings.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(file: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        look_at(file, text, &mut findings);
        findings
    }

    #[test]
    fn finds_what_it_is_for() {
        assert_eq!(findings("a.rs", concat!("fn f() {\n    un", "safe { g() }\n}\n")).len(), 1);
        assert_eq!(findings("a.rs", concat!("#[", "ignore = \"slow\"]\n")).len(), 1);
        assert_eq!(findings("a.md", "text \n").len(), 1);
        assert_eq!(findings("a.md", concat!("see /ro", "ot/x\n")).len(), 1);
    }

    #[test]
    fn lets_the_rest_pass() {
        assert!(findings("common/src/slot.rs", concat!("un", "safe impl Sync for Slot {}\n")).is_empty());
        assert!(findings("a.rs", concat!("#![deny(un", "safe_code)] // no un", "safe here\n")).is_empty());
        assert!(findings("a.md", concat!("src/ro", "ot/x and ./wo", "rk/y\n")).is_empty());
    }

    #[test]
    fn reads_names_in_quotes() {
        assert_eq!(quoted("name = \"a\"\nsource = \"b\"\n", "source = "), ["b"]);
        assert_eq!(quoted("  \"x 1.0\",\n  \"y\",\n", ""), ["x 1.0", "y"]);
    }
}
