//! The systemd unit.

use std::{sync::LazyLock, time::Duration};

use penstock_agent::capability;

use super::{CONFIG_PATH, config, manifests::names, read};

/// The values of a key in the unit. The file is read once.
fn unit(key: &str) -> Vec<&'static str> {
    static UNIT: LazyLock<String> = LazyLock::new(|| read("deploy/penstock.service"));
    let values = UNIT.lines().filter_map(|line| line.split_once('='));
    values.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
}

#[test]
fn systemd_unit_starts_agent_with_required_settings() {
    let config = config("deploy/penstock.toml");
    assert_eq!(unit("ExecStart"), [format!("/usr/local/bin/penstock run --config {CONFIG_PATH}")]);
    assert_eq!(unit("ExecStartPre"), [format!("/usr/local/bin/penstock config check --config {CONFIG_PATH}")]);
    // EX_USAGE, the agent's exit code for an invalid configuration.
    assert_eq!(unit("RestartPreventExitStatus"), ["64"]);
    // systemd has ambient capabilities and starts the agent as another user.
    for key in ["AmbientCapabilities", "CapabilityBoundingSet"] {
        assert_eq!(unit(key), [names(&capability::LOADING).join(" ")], "{key}");
    }
    let files: usize = unit("LimitNOFILE")[0].parse().expect("a number");
    assert!(files > 2 * config.listen.max_connections, "each connection needs a client's and an endpoint's socket");
}

#[test]
fn systemd_stop_timeout_exceeds_drain_timeout() {
    let timeouts = config("deploy/penstock.toml").timeouts;
    let leaves = timeouts.lame_duck.unwrap_or_default() + timeouts.drain;
    let [stop] = unit("TimeoutStopSec")[..].try_into().expect("one TimeoutStopSec");
    let stop: u64 = stop.strip_suffix('s').and_then(|number| number.parse().ok()).expect("seconds");
    assert!(Duration::from_secs(stop) > leaves, "{stop} s is not longer than {leaves:?}");
    assert_eq!(unit("KillSignal"), ["SIGTERM"]);
}

#[test]
fn systemd_creates_the_folder_for_state() {
    let folder = config("deploy/kubernetes/penstock.toml").kubernetes.state_dir.expect("a state_dir");
    let [name] = unit("StateDirectory")[..].try_into().expect("one StateDirectory");
    assert_eq!(std::path::Path::new("/var/lib").join(name), folder);
}

/// The instance that takes over must be of the same user, and find the socket after another one has ended.
#[test]
fn systemd_instances_can_take_over_from_each_other() {
    let [socket] = unit("Environment")[..].try_into().expect("one Environment");
    let socket = std::path::Path::new(socket.strip_prefix("PENSTOCK_UPGRADE_SOCKET=").expect("an upgrade socket"));
    let [folder] = unit("RuntimeDirectory")[..].try_into().expect("one RuntimeDirectory");
    assert_eq!(socket.parent(), Some(std::path::Path::new("/run").join(folder).as_path()));
    assert_eq!((unit("RuntimeDirectoryPreserve"), unit("User").len()), (vec!["yes"], 1));
    // The agent tells when it is ready, and exits with 0 after another one has taken over.
    assert_eq!((unit("Type"), unit("Restart")), (vec!["notify"], vec!["on-failure"]));
    assert_eq!(unit("TimeoutStartSec"), ["infinity"]);
}
