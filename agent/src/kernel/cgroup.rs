//! Where the cgroup v2 hierarchy is mounted: beside v1 it may be anywhere (cgroups(7)).

use std::path::PathBuf;

use thiserror::Error;

#[derive(Debug, Error)]
pub enum CgroupError {
    #[error("/proc/mounts cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error(
        "no cgroup v2 hierarchy is mounted; `mount -t cgroup2 none DIRECTORY` mounts one, `steering.cgroup` names it"
    )]
    NotMounted,
}

/// The root of the hierarchy, as this process sees it.
pub fn root() -> Result<PathBuf, CgroupError> {
    root_in(&std::fs::read_to_string("/proc/mounts")?).ok_or(CgroupError::NotMounted)
}

/// Fields are separated by blanks, and blanks within them written as `\\040` (getmntent(3)).
fn root_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (directory, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| directory.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::root_in;

    #[test]
    fn finds_the_hierarchy_beside_others() {
        let unified = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                       none /sys/fs/cgroup/the\\040unified cgroup2 rw,nosuid 0 0\n";
        assert_eq!(root_in(unified), Some("/sys/fs/cgroup/the unified".into()));
        assert_eq!(root_in("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\n"), None);
    }
}
