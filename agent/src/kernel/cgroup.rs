//! Finds the mount point of the cgroup v2 hierarchy, which may be anywhere if v1 is mounted too (cgroups(7)).

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why the root of the hierarchy was not found.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The mounts are unknown.
    #[error("cannot read /proc/mounts: {0}")]
    Read(#[from] std::io::Error),
    /// `/proc/mounts` has no `cgroup2`.
    #[error("no cgroup v2 hierarchy is mounted; run `mount -t cgroup2 none DIRECTORY` and set `steering.cgroup`")]
    NotMounted,
    /// Every mounted hierarchy is a part of the machine's; the first one's mount point.
    #[error(
        "{0} is the root of a private cgroup namespace, so endpoints outside of this container cannot be recognised; \
         mount the node's hierarchy and set steering.cgroup"
    )]
    Private(String),
}

/// The root of the hierarchy. Fails if this process sees only a part of the hierarchy.
pub fn root() -> Result<PathBuf, CgroupError> {
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    let first = roots_in(&mounts).next().ok_or(CgroupError::NotMounted)?;
    roots_in(&mounts).find(|root| is_whole(root)).ok_or_else(|| CgroupError::Private(first.display().to_string()))
}

/// Whether programs attached here see every socket of this machine: only the real root has no `cgroup.type`
/// (cgroups(7)).
pub fn is_whole(cgroup: &Path) -> bool {
    !cgroup.join("cgroup.type").exists()
}

/// Mount points of cgroup v2. Fields are separated by blanks; blanks within fields are written as `\\040`
/// (getmntent(3)).
fn roots_in(mounts: &str) -> impl Iterator<Item = PathBuf> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (directory, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| directory.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_is_found_among_others() {
        let unified = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                       none /sys/fs/cgroup/the\\040unified cgroup2 rw,nosuid 0 0\n";
        assert_eq!(roots_in(unified).collect::<Vec<_>>(), [PathBuf::from("/sys/fs/cgroup/the unified")]);
        assert_eq!(roots_in("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\n").next(), None);
    }
}
