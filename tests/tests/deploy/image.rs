//! The Dockerfile.

use std::collections::BTreeSet;

use super::{config, manifests::Manifests, read, root, xtask};

/// The instructions of the Dockerfile with their arguments.
fn dockerfile() -> Vec<(String, String)> {
    let text = read("deploy/Dockerfile");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.split_once(' ').expect("an instruction has no arguments"))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect()
}

#[test]
fn dockerfile_copies_whole_workspace() {
    let mut copied = BTreeSet::new();
    for (_, arguments) in
        dockerfile().iter().filter(|(name, arguments)| name == "COPY" && !arguments.starts_with("--from="))
    {
        let mut words: Vec<&str> = arguments.split(' ').collect();
        words.pop().expect("a destination");
        for source in words {
            assert!(root().join(source).exists(), "COPY {source}: file not found");
            copied.insert(source.to_owned());
        }
    }
    let manifest: toml::Table = read("Cargo.toml").parse().expect("Cargo.toml is TOML");
    for member in manifest["workspace"]["members"].as_array().expect("members") {
        let member = member.as_str().expect("a folder");
        assert!(copied.contains(member), "the workspace member {member} is not copied");
    }
}

#[test]
fn dockerfile_entrypoint_and_ports_match_pod() {
    let last = |wanted: &str| {
        let found = dockerfile().into_iter().rfind(|(name, _)| name == wanted);
        found.unwrap_or_else(|| panic!("no {wanted}")).1
    };
    assert_eq!(last("ENTRYPOINT"), r#"["/usr/local/bin/penstock"]"#);
    let arguments: Vec<String> = serde_json::from_str(&last("CMD")).expect("CMD is not in exec form");
    assert_eq!(Some(arguments), Manifests::pod_network().container().args);
    assert_eq!(last("STOPSIGNAL"), "SIGTERM");
    let config = config("deploy/penstock.toml");
    assert_eq!(last("EXPOSE"), format!("{} {}", config.listen.address.port(), config.admin.address.port()));
}

#[test]
fn dockerfile_xtask_commands_exist() {
    let runs: Vec<String> = dockerfile().into_iter().filter(|(name, _)| name == "RUN").map(|(_, line)| line).collect();
    assert!(runs.len() >= 3, "{runs:?}");
    for line in runs {
        let mut words = line.split(' ');
        assert_eq!(words.next(), Some("cargo"), "{line}");
        if words.next() == Some("xtask") {
            // With --help, the whole line is checked and nothing runs.
            xtask(&words.chain(["--help"]).collect::<Vec<_>>());
        }
    }
}
