//! What runs in the machine: the agent, and the tests that look at the kernel's part. They are built as `cargo xtask test`
//! builds them, so a machine that has just run the tests builds nothing here; cargo's messages say where they are.

use std::{path::PathBuf, process::Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{cargo, line};

/// A test binary, and which of its tests: those whose names contain one of these, or all.
struct Ring {
    binary: &'static str,
    /// What cargo calls the target: `test`, or `lib` for a library's unit tests.
    kind: &'static str,
    names: &'static [&'static str],
    /// How many at a time: one, so that its deadlines have both processors for themselves; more where tests mostly wait.
    threads: u32,
    /// Seconds, many times what it takes, for a machine that other work keeps busy.
    limit: u32,
}

/// Unit tests first: when one of them fails, there is no need to look at what follows.
const RING: [Ring; 4] = [
    Ring {
        binary: "penstock_agent",
        kind: "lib",
        names: &["kernel::", "selftest::", "endpoint::connection"],
        threads: 1,
        limit: 300,
    },
    Ring { binary: "broken", kind: "test", names: &[], threads: 1, limit: 900 },
    Ring { binary: "steering", kind: "test", names: &[], threads: 1, limit: 900 },
    // Five hundred clients at once are too much for it.
    Ring { binary: "stalled", kind: "test", names: &["one::"], threads: 2, limit: 900 },
];

/// One command for the machine.
pub(crate) struct Run {
    pub(crate) name: &'static str,
    pub(crate) limit: u32,
    pub(crate) args: Vec<String>,
}

/// Every binary of the ring; `filter` stands in for its own choice of tests.
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
    let messages = built(&["build", "--bins"])?;
    executable(&messages, "bin", "penstock").context("cargo has built no binary penstock")
}

/// Builds the tests; the ring's, by name.
pub(crate) fn tests() -> Result<Vec<(&'static str, PathBuf)>> {
    let messages = built(&["test", "--no-run"])?;
    let find = |ring: &Ring| {
        let path = executable(&messages, ring.kind, ring.binary);
        Ok((ring.binary, path.with_context(|| format!("cargo has built no test binary {}", ring.binary))?))
    };
    RING.iter().map(find).collect()
}

fn built(args: &[&str]) -> Result<String> {
    let mut cargo = cargo();
    cargo.args(args).arg("--message-format=json-render-diagnostics").stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = cargo.output().with_context(|| format!("starting {}", line(&cargo)))?;
    if !output.status.success() {
        bail!("{} ended with {}", line(&cargo), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The executable of the target of this kind and name; of a library, that of its unit tests.
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
