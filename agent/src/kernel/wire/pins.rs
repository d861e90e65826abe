//! Where programs and maps are pinned so that flows outlive the agent: a folder of a bpffs for each agent of each network namespace.
//!
//! `BPFFS/penstock/COOKIE/NUMBER_vVERSION`: the namespace's cookie, a number that is free, and [`VERSION`]. An agent holds a lock
//! (flock) on its folder for as long as it lives, so a folder that can be locked has no owner. The lock on the namespace's folder
//! is held while folders are created or looked through. Everything is reached through open descriptors, because the user that the
//! agent becomes may not enter the bpffs.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io,
    os::{
        fd::AsRawFd as _,
        unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown},
    },
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::{
    sys::statfs::statfs,
    unistd::{Gid, Uid, setegid},
};
use penstock_common::wire::flow::VERSION;
use thiserror::Error;

use super::netns;
use crate::config::Bpffs;

/// The folder of all agents in a bpffs.
const OURS: &str = "penstock";
/// Places of a bpffs, if the settings name none: of a container, and of a machine.
const PLACES: [&str; 2] = ["/run/penstock/bpf", "/sys/fs/bpf"];
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// How long another agent may look through the folders.
const LOCK: Duration = Duration::from_secs(5);
const MOST_INSTANCES: u32 = 1000;

#[derive(Debug, Error)]
pub enum PinError {
    #[error("{} is not a bpffs", .0.display())]
    NotBpffs(PathBuf),
    #[error("found no bpffs at {}", PLACES.join(" or "))]
    NoBpffs,
    #[error("{}: {}", .0.display(), .1)]
    Folder(PathBuf, io::Error),
    #[error("the network namespace has no cookie: {0}")]
    Cookie(io::Error),
    #[error("{}: another agent holds the lock", .0.display())]
    Locked(PathBuf),
    #[error("{} has {MOST_INSTANCES} folders", .0.display())]
    Full(PathBuf),
}

/// An open folder.
pub(super) struct Folder {
    file: File,
    path: PathBuf,
}

impl Folder {
    fn open(path: &Path) -> Result<Self, PinError> {
        Self::open_as(path, path.to_owned())
    }

    /// Opens what messages call `path`.
    fn open_as(real: &Path, path: PathBuf) -> Result<Self, PinError> {
        match File::open(real).and_then(|file| file.metadata().map(|found| (file, found.is_dir()))) {
            Ok((file, true)) => Ok(Self { file, path }),
            Ok(_) => Err(PinError::Folder(path, io::ErrorKind::NotADirectory.into())),
            Err(error) => Err(PinError::Folder(path, error)),
        }
    }

    fn try_clone(&self) -> Result<Self, PinError> {
        let file = self.file.try_clone().map_err(|error| self.failed(error))?;
        Ok(Self { file, path: self.path.clone() })
    }

    /// The path of an entry, whatever this user may enter.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.file.as_raw_fd()))
    }

    fn child(&self, name: &str) -> Result<Self, PinError> {
        Self::open_as(&self.at(name), self.path.join(name))
    }

    fn create(&self, name: &str) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(self.at(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            created => created,
        }
    }

    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.at("."))? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn failed(&self, error: io::Error) -> PinError {
        PinError::Folder(self.path.clone(), error)
    }
}

/// The folder of all agents, which [`prepare`] opened.
static PREPARED: OnceLock<Folder> = OnceLock::new();

/// Creates the folder of all agents while a single-threaded process is root, for the group that it is about to join: a container's
/// root may not give a folder to another user. A failure shows when the folder is used.
pub fn prepare(place: &Bpffs, gid: u32) {
    let Ok(Some(bpffs)) = find(place) else { return };
    let ours = bpffs.join(OURS);
    // The owner of a folder may give it to a group that is his own.
    let own = Gid::effective();
    if !Uid::effective().is_root() || setegid(Gid::from_raw(gid)).is_err() {
        return;
    }
    let _ = fs::create_dir(&ours);
    let _ = chown(&ours, None, Some(gid)).and_then(|()| fs::set_permissions(&ours, Permissions::from_mode(0o770)));
    let _ = setegid(own);
    if let Ok(folder) = Folder::open(&ours) {
        let _ = PREPARED.set(folder);
    }
}

/// The bpffs; `None` if the settings want none.
fn find(place: &Bpffs) -> Result<Option<PathBuf>, PinError> {
    let is_bpffs = |path: &Path| statfs(path).is_ok_and(|found| found.filesystem_type().0 == BPF_FS_MAGIC);
    match place {
        Bpffs::Off => Ok(None),
        Bpffs::At(path) if is_bpffs(path) => Ok(Some(path.clone())),
        Bpffs::At(path) => Err(PinError::NotBpffs(path.clone())),
        Bpffs::Auto => match PLACES.iter().map(Path::new).find(|path| is_bpffs(path)) {
            Some(path) => Ok(Some(path.to_owned())),
            None => Err(PinError::NoBpffs),
        },
    }
}

/// The folders of one network namespace.
pub struct Namespace {
    ours: Folder,
    folder: Folder,
    cookie: String,
}

/// The folder of one agent, and the lock that says that the agent lives.
pub(super) struct Instance {
    pub(super) folder: Folder,
    namespace: Folder,
    name: String,
    pub(super) version: u32,
}

/// What the folder of another agent is.
pub(super) enum FoundFolder {
    /// Its agent is alive.
    Alive(String),
    /// It has no owner, and this process holds its lock now.
    Dead(Instance),
}

impl Namespace {
    /// The folders of this thread's network namespace, which are created if they are missing. `None` if the settings want none.
    pub fn open(place: &Bpffs) -> Result<Option<Self>, PinError> {
        let Some(bpffs) = find(place)? else { return Ok(None) };
        let ours = match PREPARED.get().filter(|folder| folder.path.starts_with(&bpffs)) {
            Some(folder) => folder.try_clone()?,
            None => {
                let bpffs = Folder::open(&bpffs)?;
                bpffs.create(OURS).map_err(|error| bpffs.failed(error))?;
                bpffs.child(OURS)?
            }
        };
        let cookie = netns::cookie().map_err(PinError::Cookie)?.to_string();
        ours.create(&cookie).map_err(|error| ours.failed(error))?;
        Ok(Some(Self { folder: ours.child(&cookie)?, ours, cookie }))
    }

    /// The same folders, without creating any. Returns `None` if no agent has created them.
    pub fn existing(place: &Bpffs) -> Result<Option<Self>, PinError> {
        let bpffs = match find(place) {
            Ok(Some(bpffs)) => bpffs,
            Ok(None) | Err(PinError::NoBpffs) => return Ok(None),
            Err(error) => return Err(error),
        };
        let cookie = netns::cookie().map_err(PinError::Cookie)?.to_string();
        let path = bpffs.join(OURS);
        match (Folder::open(&path), Folder::open(&path.join(&cookie))) {
            (Ok(ours), Ok(folder)) => Ok(Some(Self { ours, folder, cookie })),
            (Err(PinError::Folder(_, error)), _) | (_, Err(PinError::Folder(_, error)))
                if error.kind() == io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// A new folder for this process.
    pub(super) fn claim(&self) -> Result<Instance, PinError> {
        let _lock = lock(&self.folder)?;
        let names = self.folder.names().map_err(|error| self.folder.failed(error))?;
        let taken: Vec<u32> = names.iter().filter_map(|name| parse(name)).map(|(number, _)| number).collect();
        let free = (0..MOST_INSTANCES).find(|number| !taken.contains(number));
        let number = free.ok_or_else(|| PinError::Full(self.folder.path.clone()))?;
        let name = format!("{number}_v{VERSION}");
        self.folder.create(&name).map_err(|error| self.folder.failed(error))?;
        match instance(&self.folder, &name, VERSION)? {
            FoundFolder::Dead(instance) => Ok(instance),
            FoundFolder::Alive(_) => Err(PinError::Locked(self.folder.path.join(name))),
        }
    }

    /// The folders of all agents of the namespace. Claims those without an owner.
    pub(super) fn instances(&self) -> Result<Vec<FoundFolder>, PinError> {
        let _lock = lock(&self.folder)?;
        instances(&self.folder)
    }

    /// Folders of other network namespaces that have no owner.
    pub(super) fn elsewhere(&self) -> Result<Vec<Instance>, PinError> {
        let mut found = Vec::new();
        for name in self.ours.names().map_err(|error| self.ours.failed(error))? {
            if name == self.cookie {
                continue;
            }
            let Ok(folder) = self.ours.child(&name) else { continue };
            let Ok(_lock) = lock(&folder) else { continue };
            let dead = |one| if let FoundFolder::Dead(instance) = one { Some(instance) } else { None };
            found.extend(instances(&folder).unwrap_or_default().into_iter().filter_map(dead));
        }
        Ok(found)
    }

    /// Removes the folders of network namespaces without agents, and then that of all agents.
    pub(super) fn tidy(&self) {
        for name in self.ours.names().unwrap_or_default() {
            // Only an empty folder can be removed.
            let _ = fs::remove_dir(self.ours.at(&name));
        }
        let _ = fs::remove_dir(&self.ours.path);
    }
}

impl Instance {
    pub(super) fn is_of_this_version(&self) -> bool {
        self.version == VERSION
    }

    /// The name for messages.
    pub(super) fn describe(&self) -> String {
        self.folder.path.display().to_string()
    }

    pub(super) fn create(&self, name: &str) -> io::Result<()> {
        self.folder.create(name)
    }

    /// Removes the folder after its entries.
    pub(super) fn remove_folder(&self) -> io::Result<()> {
        fs::remove_dir(self.namespace.at(&self.name))
    }
}

fn instances(folder: &Folder) -> Result<Vec<FoundFolder>, PinError> {
    let mut found = Vec::new();
    for name in folder.names().map_err(|error| folder.failed(error))? {
        if let Some((_, version)) = parse(&name) {
            found.push(instance(folder, &name, version)?);
        }
    }
    Ok(found)
}

fn instance(namespace: &Folder, name: &str, version: u32) -> Result<FoundFolder, PinError> {
    let folder = namespace.child(name)?;
    match folder.file.try_lock() {
        Ok(()) => Ok(FoundFolder::Dead(Instance {
            folder,
            namespace: namespace.try_clone()?,
            name: name.to_owned(),
            version,
        })),
        Err(TryLockError::WouldBlock) => Ok(FoundFolder::Alive(folder.path.display().to_string())),
        Err(TryLockError::Error(error)) => Err(folder.failed(error)),
    }
}

/// The number and version in the name of an agent's folder.
fn parse(name: &str) -> Option<(u32, u32)> {
    let (number, version) = name.split_once("_v")?;
    Some((number.parse().ok()?, version.parse().ok()?))
}

/// Locks a folder until the result is dropped.
fn lock(folder: &Folder) -> Result<File, PinError> {
    // A lock belongs to the open file, so this one is opened again.
    let file = File::open(folder.at(".")).map_err(|error| folder.failed(error))?;
    let deadline = Instant::now() + LOCK;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::park_timeout(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => return Err(PinError::Locked(folder.path.clone())),
            Err(TryLockError::Error(error)) => return Err(folder.failed(error)),
        }
    }
}
