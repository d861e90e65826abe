//! A file system of a test's own, unmounted on drop. Needs root and `mount`.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

pub struct Mounted(TempDir);

impl Mounted {
    pub fn bpffs() -> Result<Self> {
        Self::new(&["-t", "bpf"])
    }

    /// A disk with room for this many bytes, on which everyone may write.
    pub fn disk(bytes: u64) -> Result<Self> {
        Self::new(&["-t", "tmpfs", "-o", &format!("size={bytes},mode=1777")])
    }

    fn new(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = Command::new("mount");
        let output = command.args(arguments).arg("none").arg(folder.path()).output().context("starting mount")?;
        ensure!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(folder))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
