//! Checks the files in `deploy/` against the agent: ports, paths, flags and times match what the agent does; Kubernetes, Helm and
//! Prometheus accept them.

mod chart;
mod image;
mod manifests;
mod monitoring;
mod unit;

use std::{fs, path::Path, process::Command};

use penstock_agent::config::Config;
use penstock_tests::process::Process;

/// The default of `penstock run`.
const CONFIG_PATH: &str = "/etc/penstock/penstock.toml";
/// The configuration outside of Kubernetes, and the one in the manifests.
const CONFIGURATIONS: [&str; 2] = ["deploy/penstock.toml", "deploy/kubernetes/penstock.toml"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is not in a workspace")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn config(file: &str) -> Config {
    parsed(&read(file))
}

fn parsed(text: &str) -> Config {
    Config::parse(text, "penstock.toml").unwrap_or_else(|errors| panic!("{errors}\n{text}"))
}

/// Standard output of a program that `cargo xtask setup --tests` installs below target, or standard error if it fails.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = root().join("target").join(program);
    let output = Command::new(&path).args(arguments).current_dir(root()).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}; run `cargo xtask setup --tests`", path.display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stdout) + &text(&output.stderr)) }
}

/// Runs the agent binary built for these tests.
fn penstock(arguments: &[&str]) -> String {
    let binary = Process::binary("penstock").unwrap_or_else(|error| panic!("{error:#}"));
    let output = Command::new(binary).args(arguments).current_dir(root()).output().expect("could not start penstock");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "penstock {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// `cargo xtask ARGUMENTS`, which has to succeed.
fn xtask(arguments: &[&str]) {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--package", "penstock-xtask", "--"]).args(arguments);
    let output = cargo.current_dir(root()).output().expect("could not start cargo");
    assert!(output.status.success(), "xtask {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Lines that a comment sign turns off, without those that are prose.
fn commented_out(text: &str) -> String {
    let settings = text.lines().filter_map(|line| line.strip_prefix('#')).filter(|line| !line.starts_with(' '));
    settings.map(|line| format!("{line}\n")).collect()
}

#[test]
fn deployed_flags_and_configurations_are_valid() {
    for file in CONFIGURATIONS {
        assert!(!config(file).pools.is_empty(), "{file}");
    }
    penstock(&["config", "check", "--config", "deploy/penstock.toml"]);
    // With --help, the command line is parsed and nothing runs; the help also names the default.
    assert!(penstock(&["run", "--config", CONFIG_PATH, "--help"]).contains(CONFIG_PATH));
    for variable in ["PENSTOCK_LOG", "PENSTOCK_LOG_FORMAT", "PENSTOCK_NODE", "PENSTOCK_ZONE"] {
        assert!(penstock(&["run", "--help"]).contains(variable), "{variable}");
    }
}
