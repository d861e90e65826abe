//! The binaries that run in the machine: the agent and the kernel tests. They are built as `cargo xtask test` builds them, so
//! nothing is built after a test run; cargo's messages name their paths.

use std::{path::PathBuf, process::Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{cargo, line};

/// A test binary, with the tests to run: those whose names contain one of `names`, or all.
struct Ring {
    binary: &'static str,
    /// Cargo's kind of the target: `test`, or `lib` for a library's unit tests.
    kind: &'static str,
    names: &'static [&'static str],
    /// Concurrent tests: one, so that its deadlines have both processors; more if the tests mostly wait.
    threads: u32,
    /// Time limit in seconds; several times the usual time, for a busy host.
    limit: u32,
}

/// Unit tests first: their failures explain later ones.
const RING: [Ring; 6] = [
    Ring {
        binary: "penstock_agent",
        kind: "lib",
        names: &["kernel::", "selftest::", "endpoint::connection"],
        threads: 1,
        limit: 900,
    },
    Ring { binary: "broken", kind: "test", names: &[], threads: 1, limit: 900 },
    Ring { binary: "steering", kind: "test", names: &[], threads: 1, limit: 900 },
    // Without the tests with five hundred clients, which overload the machine.
    Ring { binary: "stalled", kind: "test", names: &["one::"], threads: 2, limit: 900 },
    Ring { binary: "wire", kind: "test", names: &[], threads: 1, limit: 900 },
    Ring { binary: "outlive", kind: "test", names: &[], threads: 1, limit: 900 },
];

/// One command for the machine.
pub(crate) struct Run {
    pub(crate) name: &'static str,
    pub(crate) limit: u32,
    pub(crate) args: Vec<String>,
}

/// The run of each binary; `filter`, if it is not empty, replaces its list of tests.
pub(crate) fn plan(filter: &[String]) -> Vec<Run> {
    let runs = RING.iter().map(|ring| {
        let mut args = vec![format!("--test-threads={}", ring.threads)];
        if filter.is_empty() {
            args.extend(ring.names.iter().map(|&name| name.to_owned()));
        } else {
            args.extend(filter.iter().cloned());
        }
        Run { name: ring.binary, limit: ring.limit, args }
    });
    runs.collect()
}

/// Builds the agent's binary.
pub(crate) fn agent() -> Result<PathBuf> {
    let messages = built()?;
    executable(&messages, "bin", "penstock").context("cargo built no binary penstock")
}

/// Builds the tests; returns the binaries of `RING` by name.
pub(crate) fn tests() -> Result<Vec<(&'static str, PathBuf)>> {
    let messages = built()?;
    let find = |ring: &Ring| {
        let path = executable(&messages, ring.kind, ring.binary);
        Ok((ring.binary, path.with_context(|| format!("cargo built no test binary {}", ring.binary))?))
    };
    RING.iter().map(find).collect()
}

/// What cargo says of each target. Everything is built with the features that `cargo xtask test` builds with, so nothing is built twice.
fn built() -> Result<String> {
    let mut cargo = cargo();
    cargo
        .args(["build", "--all-targets"])
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = cargo.output().with_context(|| format!("starting {}", line(&cargo)))?;
    if !output.status.success() {
        bail!("{} ended with {}", line(&cargo), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The executable of the target with this kind and name; for a library, of its unit tests.
fn executable(messages: &str, kind: &str, name: &str) -> Option<PathBuf> {
    messages.lines().find_map(|message| {
        let message: Value = serde_json::from_str(message).ok()?;
        let target = &message["target"];
        let fits = target["name"] == name && target["kind"].as_array()?.iter().any(|found| found == kind);
        fits.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_executable_among_cargo_s_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"penstock_agent"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"penstock_agent"},"executable":"/t/deps/penstock_agent-1"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"steering"},"executable":"/t/deps/steering-2"}
{"reason":"build-finished","success":true}
"#;
        let find = |kind, name| executable(messages, kind, name).map(|path| path.display().to_string());
        assert_eq!(find("lib", "penstock_agent").as_deref(), Some("/t/deps/penstock_agent-1"));
        assert_eq!(find("test", "steering").as_deref(), Some("/t/deps/steering-2"));
        assert_eq!(find("bin", "steering"), None);
    }

    #[test]
    fn a_filter_replaces_the_choice_of_tests() {
        assert!(plan(&[])[0].args.contains(&"kernel::".to_owned()));
        let filtered = plan(&["one_byte".to_owned()]);
        assert!(filtered.iter().all(|run| run.args[1..] == ["one_byte"]));
    }
}
