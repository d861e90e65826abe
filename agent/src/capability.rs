//! The agent's capabilities (`capabilities(7)`), and how it drops those that it does not need.
//!
//! Capabilities belong to threads; a new thread inherits its parent's. [`begin`] keeps what a start needs,
//! [`become_user`] leaves root after the files were read, [`keep`] drops the rest before the workers start, and
//! [`with`] runs threads that need less earlier. docs/capabilities.md lists what needs which.

use std::collections::HashSet;

use anyhow::{Context as _, ensure};
use caps::{CapSet, Capability, errors::CapsError, runtime};
use nix::{
    sys::prctl,
    unistd::{self, Gid, Uid},
};

use crate::config::{self, User};

/// Capabilities needed to load and attach the kernel program.
pub const LOADING: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
/// Capability needed to bind a port below `net.ipv4.ip_unprivileged_port_start`.
pub const BINDING: Capability = Capability::CAP_NET_BIND_SERVICE;
/// Capabilities needed to become another user.
pub const IDENTITY: [Capability; 2] = [Capability::CAP_SETUID, Capability::CAP_SETGID];

/// Capability needed to make the network namespaces in which path `wire` proves itself.
pub const PROVING: Capability = Capability::CAP_SYS_ADMIN;

/// The capabilities of [`LOADING`] that this thread lacks.
pub fn missing() -> Vec<Capability> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    LOADING.into_iter().filter(|capability| !held.contains(capability)).collect()
}

/// Names of the permitted capabilities of this thread.
pub fn held() -> Vec<String> {
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let mut names: Vec<String> = held.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    names
}

/// Limits a single-threaded process to the capabilities that a start needs. Also empties the bounding set if that is
/// permitted (CAP_SETPCAP), so that no executed program gains capabilities.
pub fn begin() -> Result<(), CapsError> {
    // The agent executes no other program, so a kernel that refuses this changes nothing.
    let _ = nix::sys::prctl::set_no_new_privs();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in runtime::thread_all_supported() {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    keep(&[&LOADING[..], &IDENTITY, &[BINDING, PROVING]].concat())
}

/// Switches from root to the configured user and groups and drops the capabilities that only this needed. For a
/// single-threaded process. Keeps the user if the process is not root or no user is configured. `proves`: path `wire` will prove
/// itself.
pub fn become_user(process: &config::Process, proves: bool) -> anyhow::Result<()> {
    let proving = if proves { &[PROVING][..] } else { &[] };
    let start = [&LOADING[..], &[BINDING], proving].concat();
    let Some(User { uid, gid }) = process.user.filter(|_| Uid::effective().is_root()) else { return Ok(keep(&start)?) };
    let held = caps::read(None, CapSet::Effective)?;
    let lacks: Vec<String> = IDENTITY.iter().filter(|one| !held.contains(one)).map(ToString::to_string).collect();
    ensure!(lacks.is_empty(), "this process lacks {}", lacks.join(", "));
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Permitted capabilities survive the change of user; effective ones have to be raised again.
    prctl::set_keepcaps(true).context("PR_SET_KEEPCAPS")?;
    unistd::setgroups(&groups).context("setgroups")?;
    unistd::setresgid(gid, gid, gid).context("setresgid")?;
    unistd::setresuid(uid, uid, uid).context("setresuid")?;
    prctl::set_keepcaps(false).context("PR_SET_KEEPCAPS")?;
    caps::set(None, CapSet::Effective, &caps::read(None, CapSet::Permitted)?)?;
    Ok(keep(&start)?)
}

/// The user and groups of this process, for the log and `/readyz?verbose`.
pub fn user() -> String {
    let groups = unistd::getgroups().unwrap_or_default();
    let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
    let groups = if groups.is_empty() { "none".to_owned() } else { groups.join(", ") };
    let root = if Uid::effective().is_root() {
        ", which can write system files: set process.user to an ordinary user"
    } else {
        ""
    };
    format!("user: uid {}, gid {}, groups: {groups}{root}", Uid::effective(), Gid::effective())
}

/// Drops all capabilities but `kept`, for this thread and for threads that it starts.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let kept: HashSet<Capability> = kept.iter().copied().collect();
    // The permitted set goes last because the others are subsets of it. Emptying the inheritable set empties the
    // ambient one.
    caps::set(None, CapSet::Inheritable, &HashSet::new())?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        let held = caps::read(None, set)?;
        caps::set(None, set, &(&held & &kept))?;
    }
    Ok(())
}

/// Runs `work` on a new thread that has only the capabilities in `kept`, as have the threads that it starts.
///
/// # Panics
/// If `work` does.
pub fn with<T: Send>(kept: &[Capability], work: impl FnOnce() -> T + Send) -> T {
    let restricted = || {
        // A failure here fails for all threads, and the start reports it.
        let _ = keep(kept);
        work()
    };
    std::thread::scope(|scope| scope.spawn(restricted).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These tests run as root, each on its own thread.
    fn of_this_thread(set: CapSet) -> HashSet<Capability> {
        caps::read(None, set).unwrap()
    }

    const SEND_BUFFERS: Capability = Capability::CAP_NET_ADMIN;

    #[test]
    fn dropped_capabilities_are_lost_by_this_thread_and_its_children_only() {
        let before = of_this_thread(CapSet::Permitted);
        assert!(missing().is_empty(), "these tests need {LOADING:?}");
        with(&[SEND_BUFFERS], || {
            let sets = [CapSet::Effective, CapSet::Permitted].map(of_this_thread);
            assert_eq!(sets, [HashSet::from([SEND_BUFFERS]), HashSet::from([SEND_BUFFERS])]);
            assert_eq!(held(), ["CAP_NET_ADMIN"]);
            assert_eq!(missing(), [Capability::CAP_BPF, Capability::CAP_PERFMON]);
            std::thread::spawn(|| assert_eq!(held(), ["CAP_NET_ADMIN"])).join().unwrap();
            // A dropped capability cannot be raised again.
            assert!(caps::raise(None, CapSet::Effective, Capability::CAP_BPF).is_err());
        });
        assert_eq!(of_this_thread(CapSet::Permitted), before);
    }

    #[test]
    fn begin_limits_capabilities_to_those_of_a_start() {
        std::thread::spawn(|| {
            begin().unwrap();
            let most = [LOADING.to_vec(), IDENTITY.to_vec(), vec![BINDING, PROVING]].concat();
            assert!(of_this_thread(CapSet::Permitted).iter().all(|one| most.contains(one)));
            assert_eq!(of_this_thread(CapSet::Bounding), HashSet::new());
            assert_eq!(nix::sys::prctl::get_no_new_privs(), Ok(true));
            assert!(missing().is_empty());
            // A second call has nothing left to drop.
            begin().unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn begin_without_capabilities_succeeds() {
        with(&[], || {
            begin().unwrap();
            assert_eq!(held(), [""; 0]);
        });
    }
}
