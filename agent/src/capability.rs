//! What the agent may do beyond an ordinary process (`capabilities(7)`), and how it gives up what it does not need.
//!
//! Capabilities belong to threads, and a new thread has those of the one that starts it. So `penstock run` narrows itself to
//! what a start takes before it reads its files or has other threads ([`begin`]); it reads its configuration and becomes another
//! user than root ([`become_user`]); it loads the kernel program and binds its ports; and the thread that starts all others gives
//! up the rest ([`keep`]) before it starts the first. What must have less earlier, the log and the proof, runs by [`with`].
//! docs/capabilities.md says what needs which.

use std::collections::HashSet;

use anyhow::{Context as _, ensure};
use caps::{CapSet, Capability, errors::CapsError, runtime};
use nix::{
    sys::prctl,
    unistd::{self, Gid, Uid},
};

use crate::config::{self, User};

/// What loading the kernel program and attaching it takes.
pub const LOADING: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];
/// What a port below `net.ipv4.ip_unprivileged_port_start` takes.
pub const BINDING: Capability = Capability::CAP_NET_BIND_SERVICE;
/// What becoming another user takes.
pub const IDENTITY: [Capability; 2] = [Capability::CAP_SETUID, Capability::CAP_SETGID];

/// Those of [`LOADING`] that this thread does not have.
pub fn missing() -> Vec<Capability> {
    let held = caps::read(None, CapSet::Effective).unwrap_or_default();
    LOADING.into_iter().filter(|capability| !held.contains(capability)).collect()
}

/// What this thread could use, by name.
pub fn held() -> Vec<String> {
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let mut names: Vec<String> = held.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    names
}

/// For a process that has one thread: no more than a start takes, now or ever. Empties the bounding set where that is permitted
/// (CAP_SETPCAP), and no program that is executed gains anything.
pub fn begin() -> Result<(), CapsError> {
    // Nothing is executed, and a kernel that refuses has said no to nothing that the agent does.
    let _ = nix::sys::prctl::set_no_new_privs();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in runtime::thread_all_supported() {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    keep(&[&LOADING[..], &IDENTITY, &[BINDING]].concat())
}

/// Gives up root for the user and the groups given, and what only that took. For a process that has one thread. Without root, or with
/// `None`, the user stays.
pub fn become_user(process: &config::Process) -> anyhow::Result<()> {
    let start = [&LOADING[..], &[BINDING]].concat();
    let Some(User { uid, gid }) = process.user.filter(|_| Uid::effective().is_root()) else { return Ok(keep(&start)?) };
    let held = caps::read(None, CapSet::Effective)?;
    let lacks: Vec<String> = IDENTITY.iter().filter(|one| !held.contains(one)).map(ToString::to_string).collect();
    ensure!(lacks.is_empty(), "this process lacks {}", lacks.join(", "));
    let groups: Vec<Gid> = process.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Permitted capabilities outlive root; the effective ones have to be raised again.
    prctl::set_keepcaps(true).context("PR_SET_KEEPCAPS")?;
    unistd::setgroups(&groups).context("setgroups")?;
    unistd::setresgid(gid, gid, gid).context("setresgid")?;
    unistd::setresuid(uid, uid, uid).context("setresuid")?;
    prctl::set_keepcaps(false).context("PR_SET_KEEPCAPS")?;
    caps::set(None, CapSet::Effective, &caps::read(None, CapSet::Permitted)?)?;
    Ok(keep(&start)?)
}

/// Whom this process runs as, for the log and `/readyz?verbose`.
pub fn user() -> String {
    let groups = unistd::getgroups().unwrap_or_default();
    let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
    let groups = if groups.is_empty() { "none".to_owned() } else { groups.join(", ") };
    let root = if Uid::effective().is_root() {
        ", which owns the files of the system: process.user names another"
    } else {
        ""
    };
    format!("user: uid {}, gid {}, groups: {groups}{root}", Uid::effective(), Gid::effective())
}

/// Gives up every other capability, for this thread and for those that it starts.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let kept: HashSet<Capability> = kept.iter().copied().collect();
    // The permitted set last: the others lie in it. Emptying the inheritable set empties the ambient one.
    caps::set(None, CapSet::Inheritable, &HashSet::new())?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        let held = caps::read(None, set)?;
        caps::set(None, set, &(&held & &kept))?;
    }
    Ok(())
}

/// Runs `work` on a thread of its own that has given up every other capability, and so have the threads that it starts.
///
/// # Panics
/// If `work` does.
pub fn with<T: Send>(kept: &[Capability], work: impl FnOnce() -> T + Send) -> T {
    let restricted = || {
        // Where it fails for this thread it does for all, and the start says so.
        let _ = keep(kept);
        work()
    };
    std::thread::scope(|scope| scope.spawn(restricted).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These tests run as root, each on a thread of its own.
    fn of_this_thread(set: CapSet) -> HashSet<Capability> {
        caps::read(None, set).unwrap()
    }

    const SEND_BUFFERS: Capability = Capability::CAP_NET_ADMIN;

    #[test]
    fn what_is_not_kept_is_gone_for_this_thread_and_its_children_alone() {
        let before = of_this_thread(CapSet::Permitted);
        assert!(missing().is_empty(), "these tests need {LOADING:?}");
        with(&[SEND_BUFFERS], || {
            let sets = [CapSet::Effective, CapSet::Permitted].map(of_this_thread);
            assert_eq!(sets, [HashSet::from([SEND_BUFFERS]), HashSet::from([SEND_BUFFERS])]);
            assert_eq!(held(), ["CAP_NET_ADMIN"]);
            assert_eq!(missing(), [Capability::CAP_BPF, Capability::CAP_PERFMON]);
            std::thread::spawn(|| assert_eq!(held(), ["CAP_NET_ADMIN"])).join().unwrap();
            // It does not come back.
            assert!(caps::raise(None, CapSet::Effective, Capability::CAP_BPF).is_err());
        });
        assert_eq!(of_this_thread(CapSet::Permitted), before);
    }

    #[test]
    fn a_start_bounds_what_can_ever_be_had() {
        std::thread::spawn(|| {
            begin().unwrap();
            let most = [LOADING.to_vec(), IDENTITY.to_vec(), vec![BINDING]].concat();
            assert!(of_this_thread(CapSet::Permitted).iter().all(|one| most.contains(one)));
            assert_eq!(of_this_thread(CapSet::Bounding), HashSet::new());
            assert_eq!(nix::sys::prctl::get_no_new_privs(), Ok(true));
            assert!(missing().is_empty());
            // A second time there is nothing to bound.
            begin().unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn without_any_there_is_nothing_to_give_up() {
        with(&[], || {
            begin().unwrap();
            assert_eq!(held(), [""; 0]);
        });
    }
}
