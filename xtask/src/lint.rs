//! `cargo xtask lint`: formatting, clippy, warnings of the kernel program, and rules of this project that no compiler checks.
//!
//! The rules read tracked files. Every finding is printed as `file:line: what`, then the command fails.

mod aarch64;
mod dependencies;
pub(crate) mod links;
mod pages;
mod types;
mod words;

use std::fs;

use anyhow::{Context, Result, bail};

use crate::{
    book,
    command::{cargo, command, output, root, run},
    ebpf,
    progress::Steps,
};

/// Files with more lines usually hold two topics.
const LONG_FILE: usize = 500;

/// Split, so that this file does not violate its own rules.
const NEVER_IN_RUST: [&str; 4] =
    [concat!("#[", "ignore"), concat!("#[", "should_panic"), concat!("to", "do!("), concat!("unimple", "mented!(")];
/// The attribute that permits unsafe code; rustc denies unsafe code without it.
const UNSAFE_ALLOWED: &str = concat!("(un", "safe_code)");
const UNSAFE_PLACES: [&str; 5] = [
    "agent-ebpf/",
    "common/",
    "agent/src/kernel.rs",
    // tokio has no safe way to register a timer.
    "tests/src/model_server/pacer.rs",
    // A TAP interface is made by ioctl.
    "tests/src/tap.rs",
];
/// The code that accesses slots. Anything else would have to keep the order of steps in `steer/session.rs`.
const SLOT_PLACES: [&str; 3] = ["agent/src/kernel/", "agent/src/steer.rs", "agent/src/steer/"];
const SLOT_ACCESS: [&str; 4] =
    [concat!("Slot", "Ref"), concat!("Span", "Ref"), concat!(".slot", "()."), concat!(".slots()", ".get(")];
/// Paths of one machine and hosts of package registries do not belong into the repository.
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
    // Every step runs, also after a failed one, so that all findings are visible at once.
    let results = [
        steps.step("formatting", || run(cargo().args(["fmt", "--all", "--check"]))),
        steps.step("project rules", rules),
        steps.step("dependencies", dependencies::check),
        steps.step("kernel program without warnings", || ebpf::build(ebpf::Warnings::Deny)),
        steps.step("documentation", documentation),
        steps.step("book", book::main),
        steps.step("clippy", || run(cargo().args(["clippy", "--all-targets", "--", "-D", "warnings"]))),
        steps.step("agent on aarch64, without features", aarch64::check),
    ];
    let errors: Vec<String> = results.into_iter().filter_map(|result| Some(format!("{:#}", result.err()?))).collect();
    if !errors.is_empty() {
        bail!("{}", errors.join("; "));
    }
    Ok(())
}

/// rustdoc, which checks the links in doc comments. Private items are documented, too, so links to them lead somewhere.
fn documentation() -> Result<()> {
    let mut doc = cargo();
    doc.args([
        "doc",
        "--quiet",
        "--no-deps",
        "--document-private-items",
        "--package",
        "penstock-agent",
        "--package",
        "penstock-common",
    ]);
    run(doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links"))
}

fn rules() -> Result<()> {
    let files = output(command("git").args(["ls-files"])).context("listing the tracked files with git")?;
    let (mut findings, mut type_names) = (Vec::new(), types::TypeNames::default());
    for file in files.lines().filter(|file| *file != "Cargo.lock" && !file.starts_with("fuzz/corpus/")) {
        // Skips binary files, and files that are deleted but not yet committed.
        let Ok(text) = fs::read_to_string(root().join(file)) else { continue };
        check_text(file, &text, &mut findings);
        if file.ends_with(".rs") {
            type_names.check(file, &text, &mut findings);
        }
        if file.ends_with(".md") {
            links::check(root(), file, &text, &mut findings);
        }
    }
    pages::check(root(), &files.lines().collect::<Vec<_>>(), &mut findings);
    report(&findings)
}

fn check_text(file: &str, text: &str, findings: &mut Vec<String>) {
    let rust = file.ends_with(".rs");
    let may_touch_slots = SLOT_PLACES.iter().any(|place| file.starts_with(place));
    let may_be_unsafe = UNSAFE_PLACES.iter().any(|place| file.starts_with(place));
    for (line, number) in text.lines().zip(1..) {
        let mut found = |what: String| findings.push(format!("{file}:{number}: {what}"));
        if line.ends_with([' ', '\t']) {
            found("white space at the end of the line".to_owned());
        }
        if let Some(phrase) = words::check(file, line) {
            found(phrase);
        }
        for never in NEVER_IN_TEXT.into_iter().filter(|never| occurs_alone(line, never)) {
            found(format!("`{never}`: a path of one machine or a registry's host"));
        }
        if rust {
            for never in NEVER_IN_RUST.into_iter().filter(|never| line.contains(never)) {
                found(format!("`{never}`: tests must run, and code must be complete"));
            }
            if !may_be_unsafe && line.contains(UNSAFE_ALLOWED) {
                found(format!("unsafe code belongs in {}", UNSAFE_PLACES.join(", ")));
            }
            let code = line.split("//").next().unwrap_or_default();
            for access in SLOT_ACCESS.into_iter().filter(|access| !may_touch_slots && code.contains(access)) {
                found(format!("`{access}`: slots are armed, disarmed and read in {}", SLOT_PLACES.join(", ")));
            }
        }
    }
    let lines = text.lines().count();
    if rust && lines > LONG_FILE {
        findings.push(format!("{file}: {lines} lines, expected at most {LONG_FILE}: split it by topic"));
    }
}

/// Whether the text occurs outside of a longer path or name.
fn occurs_alone(line: &str, text: &str) -> bool {
    let in_a_name = |before: char| before.is_alphanumeric() || "._-".contains(before);
    line.match_indices(text).any(|(at, _)| !line[..at].ends_with(in_a_name))
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
        check_text(file, text, &mut findings);
        findings
    }

    #[test]
    fn slot_access_outside_steer_is_found() {
        let accesses = [
            concat!("source.slot", "().arm(path, target, framing, consumed, false);\n"),
            concat!("source.slot", "().disarm();\n"),
            concat!("fn read(span: Span", "Ref<'_>) {}\n"),
            concat!("use crate::kernel::slots::Slot", "Ref;\n"),
            concat!("let passed = kernel.slots()", ".get(index).passed();\n"),
        ];
        for access in accesses {
            assert_eq!(findings("agent/src/deliver/response.rs", access).len(), 1, "{access}");
            assert_eq!(findings("fuzz/src/steered.rs", access).len(), 1, "{access}");
            for place in ["agent/src/steer/session.rs", "agent/src/steer.rs", "agent/src/kernel/events.rs"] {
                assert!(findings(place, access).is_empty(), "{place}: {access}");
            }
        }
        let others = concat!("metrics.slot", "(); // Span", "Ref\nkernel.slots()", ".is_exhausted();\n");
        assert!(findings("agent/src/endpoint/pool.rs", others).is_empty());
    }

    #[test]
    fn violation_of_each_rule_is_found() {
        assert_eq!(findings("a.rs", concat!("#![allow(un", "safe_code)]\n")).len(), 1);
        assert_eq!(findings("a.rs", concat!("#[", "ignore = \"slow\"]\n")).len(), 1);
        assert_eq!(findings("a.rs", &"// a\n".repeat(LONG_FILE + 1)).len(), 1);
        assert_eq!(findings("a.md", "text \n").len(), 1);
        assert_eq!(findings("a.md", concat!("see /ro", "ot/x\n")).len(), 1);
    }

    #[test]
    fn permitted_text_is_not_found() {
        assert!(findings("common/src/slot.rs", concat!("#![allow(un", "safe_code)]\n")).is_empty());
        assert!(findings("a.rs", &"// a\n".repeat(LONG_FILE)).is_empty());
        assert!(findings("a.md", concat!("src/ro", "ot/x and ./wo", "rk/y\n")).is_empty());
    }
}
