//! Memory pressure for one process: its own memory cgroup with a limit slightly above its usage.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Above the process's usage: file pages must be reclaimed, its own fit.
const HEADROOM: u64 = 48 << 20;

/// A process's cgroup. Dropping it removes the limit; the cgroup goes with the process.
pub(super) struct MemoryCgroup {
    folder: PathBuf,
    /// The file names, which differ between cgroup versions.
    limit: &'static str,
    usage: &'static str,
    none: &'static str,
}

impl MemoryCgroup {
    /// Moves the process into a new cgroup. Fails if no memory cgroup can be created.
    pub(super) fn around(process: u32) -> Result<Self> {
        let name = format!("penstock-soak-{process}");
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mounted = |kind: &str, option: &str| {
            mounts.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                let fits = fields.get(2) == Some(&kind) && fields.get(3)?.split(',').any(|one| one == option);
                fits.then(|| PathBuf::from(fields[1]))
            })
        };
        let (folder, limit, usage, none) = if let Some(root) = mounted("cgroup", "memory") {
            (root.join(name), "memory.limit_in_bytes", "memory.usage_in_bytes", "-1")
        } else if let Some(root) = mounted("cgroup2", "rw") {
            (root.join(name), "memory.high", "memory.current", "max")
        } else {
            bail!("no cgroup is mounted");
        };
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let cgroup = Self { folder, limit, usage, none };
        cgroup.write("cgroup.procs", &process.to_string())?;
        Ok(cgroup)
    }

    /// Sets the limit until the guard is dropped.
    pub(super) fn press(&self) -> Result<Pressure<'_>> {
        let used: u64 = fs::read_to_string(self.folder.join(self.usage))?.trim().parse()?;
        self.write(self.limit, &(used + HEADROOM).to_string())?;
        Ok(Pressure(self))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path: &Path = &self.folder.join(file);
        fs::write(path, text).with_context(|| format!("writing {text} to {}", path.display()))
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Fails while the process runs.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Memory is scarce while this exists.
pub(super) struct Pressure<'a>(&'a MemoryCgroup);

impl Drop for Pressure<'_> {
    fn drop(&mut self) {
        let _ = self.0.write(self.0.limit, self.0.none);
    }
}
