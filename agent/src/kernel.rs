//! Loads the kernel programs and wraps their maps, slots and events, and socket calls without a safe wrapper. The only
//! module of the agent that uses aya or `unsafe`.
//!
//! `steer` decides when to insert a socket, arm a slot or reclaim a flow; this module only executes it.
#![allow(unsafe_code)]

mod bpf;
mod btf;
pub mod cgroup;
pub mod descriptors;
pub mod events;
mod grace;
mod object;
pub mod slots;
pub mod socket;
#[cfg(test)]
mod transparent;
#[cfg(test)]
pub mod tun;
pub mod version;
pub mod wire;

use std::{
    error::Error as _,
    fs::File,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, RingBuf, SockHash},
    programs::{CgroupAttachMode, SkMsg, SkSkb, SockOps, TestRun as _, TestRunOptions, Xdp},
    util::KernelVersion,
};
use aya_log::{EbpfLogger, Level};
use penstock_common::slot::{Admission, Offsets};
use thiserror::Error;
use zerocopy::IntoBytes as _;

use self::{events::Events, slots::Slots};

/// Names of the kernel programs, which `BPF_OBJ_GET_INFO_BY_FD` shows cut to 15 bytes.
pub const PROGRAM: &str = "penstock_verdict";
pub const MESSAGE_PROGRAM: &str = "penstock_message";
pub const PEERS_PROGRAM: &str = "penstock_peers";
pub const ADMIT_PROGRAM: &str = "penstock_admit";

#[derive(Debug, Error)]
pub enum LoadError {
    #[error(
        "this binary was built without the kernel program; run `cargo xtask setup`, then `cargo xtask \
         build-ebpf`, then build the agent again"
    )]
    NotBuilt,
    #[error("cannot read the kernel's type information: {0}")]
    Btf(#[from] btf::BtfError),
    #[error("cannot load the kernel program (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON): {0}")]
    Load(#[from] aya::EbpfError),
    #[error("the kernel refused the program: {0}")]
    Program(#[from] aya::programs::ProgramError),
    #[error("cannot use the kernel program's maps: {0}")]
    Map(#[from] MapError),
    #[error("cannot read the kernel program's log: {0}")]
    Log(#[from] aya_log::Error),
    #[error("the kernel program lacks {0}")]
    Missing(&'static str),
    #[error("cannot set up the kernel program's memory or events: {0}")]
    Io(#[from] std::io::Error),
    #[error("Linux before 5.7 has no cgroup links: an attached program would stay and exclude others")]
    NoLinks,
}

impl LoadError {
    /// The error and its root cause in one line, without the verifier's output.
    pub fn reason(&self) -> String {
        let whole = self.to_string();
        let line = whole.lines().next().unwrap_or_default();
        let line = line.split(" Verifier output:").next().unwrap_or_default().trim_end_matches('.');
        let last = std::iter::successors(self.source(), |&error| error.source()).last().map(ToString::to_string);
        match last {
            Some(last) if !whole.contains(&last) => format!("{line}: {last}"),
            _ => line.to_owned(),
        }
    }
}

/// The loaded programs. The kernel handles the sockets in their maps while this lives; when the last handle is dropped,
/// the kernel unloads the programs and releases the sockets.
pub struct Kernel {
    slots: Arc<Slots>,
    events: Events,
    sources: MapData,
    targets: MapData,
    index: MapData,
    tails: MapData,
    locals: MapData,
    local: Result<(), Arc<str>>,
    endpoint_visible: Option<Arc<str>>,
    /// Sockets on which calls of the endpoint block are admitted, too.
    admits_blocking: AtomicBool,
    ebpf: Ebpf,
}

impl Kernel {
    /// Loads and attaches the verdict program, with room for `max_flows` endpoint connections and as many clients.
    pub fn load(max_flows: u32) -> Result<Self, LoadError> {
        let object = object::bytes().ok_or(LoadError::NotBuilt)?;
        let offsets = btf::offsets()?;
        let words: [u32; OFFSETS] = zerocopy::transmute!(offsets);
        debug_assert_eq!(words.as_bytes(), offsets.as_bytes());
        let mut loader = EbpfLoader::new();
        loader.override_global("OFFSETS", &words, true);
        let level = if tracing::enabled!(tracing::Level::DEBUG) { Level::Debug } else { Level::Warn } as u8;
        loader.override_global(aya_log::LEVEL, &level, true);
        for map in MAPS_BY_FLOW {
            loader.map_max_entries(map, max_flows);
        }
        let mut ebpf = loader.load(object)?;
        // The programs log rarely and never per byte; their lines go to the agent's log.
        let log = EbpfLogger::init(&mut ebpf)?;

        let program = ebpf.program_mut(PROGRAM).ok_or(LoadError::Missing("verdict program"))?;
        let program: &mut SkSkb = program.try_into()?;
        program.load()?;
        let sources: SockHash<_, u64> = ebpf.map("SOURCES").ok_or(LoadError::Missing("map SOURCES"))?.try_into()?;
        let sources_fd = sources.fd().try_clone()?;
        // Attach before any socket is inserted: a socket keeps the programs that its map had at insertion
        // (sock_map_link).
        let program: &mut SkSkb = ebpf.program_mut(PROGRAM).ok_or(LoadError::Missing("verdict program"))?.try_into()?;
        program.attach(&sources_fd)?;

        let ring: RingBuf<MapData> = ebpf.take_map("EVENTS").ok_or(LoadError::Missing("map EVENTS"))?.try_into()?;
        let missed: Array<MapData, u64> =
            ebpf.take_map("MISSED").ok_or(LoadError::Missing("map MISSED"))?.try_into()?;
        let slots = match (ebpf.map("SLOTS"), ebpf.map("LOCAL_SLOTS")) {
            (Some(Map::Array(slots)), Some(Map::Array(locals))) => {
                Arc::new(Slots::map(slots.fd().as_fd(), locals.fd().as_fd(), max_flows)?)
            }
            _ => return Err(LoadError::Missing("map SLOTS")),
        };
        let events = Events::start(ring, missed, log, Arc::clone(&slots))?;
        let mut take = |name: &'static str| match ebpf.take_map(name) {
            Some(Map::SockHash(data) | Map::HashMap(data)) => Ok(data),
            _ => Err(LoadError::Missing(name)),
        };
        let (sources, targets) = (take("SOURCES")?, take("TARGETS")?);
        let (index, tails, locals) = (take("INDEX")?, take("TAILS")?, take("LOCAL_INDEX")?);
        let local = Err("not requested".into());
        Ok(Self {
            slots,
            events,
            sources,
            targets,
            index,
            tails,
            locals,
            local,
            endpoint_visible: None,
            admits_blocking: AtomicBool::new(true),
            ebpf,
        })
    }

    /// Whether endpoints on this machine are recognised; the error says why not.
    pub fn local(&self) -> Result<(), Arc<str>> {
        self.local.clone()
    }

    /// Attaches the path `local` to the given cgroup, or to the root cgroup if none is given. [`local`](Self::local)
    /// returns the result.
    pub fn try_local(&mut self, cgroup: Option<&Path>) {
        let at = |cgroup: &Path, error: &LoadError| format!("cgroup {}: {}", cgroup.display(), error.reason());
        let attached = match cgroup {
            Some(cgroup) => self.attach_local(cgroup).map_err(|error| at(cgroup, &error)),
            None => match cgroup::root() {
                Ok(root) => self.attach_local(&root).map_err(|error| at(&root, &error)),
                Err(error) => Err(error.to_string()),
            },
        };
        self.local = attached.map_err(Arc::from);
    }

    /// How the owner of a socket can observe on this kernel that the socket is in the message program's map; `None` if
    /// it cannot.
    pub fn endpoint_visible(&self) -> Option<Arc<str>> {
        self.endpoint_visible.clone()
    }

    /// Sets whether sockets on which calls of the endpoint block are admitted: such a call could tell that its socket is in a map.
    pub fn set_admits_blocking(&self, admits: bool) {
        self.admits_blocking.store(admits, Ordering::Relaxed);
    }

    /// Sets what [`endpoint_visible`](Self::endpoint_visible) returns.
    pub(crate) fn set_endpoint_visible(&mut self, how: Option<Arc<str>>) {
        self.endpoint_visible = how;
    }

    /// Inserts a socket of this process into the message program's map.
    pub fn map_as_endpoint(&mut self, socket: impl AsFd) -> Result<(), LoadError> {
        let map = self.ebpf.map_mut("LOCALS").ok_or(LoadError::Missing("map LOCALS"))?;
        let mut sockets: SockHash<_, u64> = map.try_into()?;
        let cookie = socket::cookie(&socket)?;
        Ok(sockets.insert(cookie, std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()), 0)?)
    }

    /// Stores why endpoints on this machine are not recognised.
    pub fn without_local(&mut self, why: &str) {
        self.local = Err(why.into());
    }

    /// Recognises connections to endpoints in this cgroup (all of this machine, if it is the root of a cgroup v2
    /// hierarchy) as they are made, and inspects what those endpoints send.
    pub fn attach_local(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        if KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(5, 7, 0)) {
            return Err(LoadError::NoLinks);
        }
        let cgroup = File::open(cgroup)?;
        let program = self.ebpf.program_mut(MESSAGE_PROGRAM).ok_or(LoadError::Missing("message program"))?;
        let program: &mut SkMsg = program.try_into()?;
        program.load()?;
        let sockets: SockHash<_, u64> = self.ebpf.map("LOCALS").ok_or(LoadError::Missing("map LOCALS"))?.try_into()?;
        let sockets = sockets.fd().try_clone()?;
        // Attach before any socket is inserted; see `load`.
        let program: &mut SkMsg =
            self.ebpf.program_mut(MESSAGE_PROGRAM).ok_or(LoadError::Missing("message program"))?.try_into()?;
        program.attach(&sockets)?;
        let program: &mut Xdp =
            self.ebpf.program_mut(ADMIT_PROGRAM).ok_or(LoadError::Missing("admission program"))?.try_into()?;
        program.load()?;
        let program = self.ebpf.program_mut(PEERS_PROGRAM).ok_or(LoadError::Missing("peers program"))?;
        let program: &mut SockOps = program.try_into()?;
        program.load()?;
        // A link coexists with other links in any mode and takes no flags (cgroup_bpf_link_attach).
        program.attach(cgroup, CgroupAttachMode::Single)?;
        Ok(())
    }

    /// Runs the admission program for the endpoint's socket of a connection, given the cookie of the agent's socket.
    /// Returns one of `penstock_common::slot::admission`. Needs no capability beyond the program's descriptor.
    pub fn admit(&self, connection: u64, leave: bool) -> Result<u32, LoadError> {
        let program: &Xdp =
            self.ebpf.program(ADMIT_PROGRAM).ok_or(LoadError::Missing("admission program"))?.try_into()?;
        let blocking = u64::from(self.admits_blocking.load(Ordering::Relaxed));
        let admission = Admission { connection, leave: u64::from(leave), blocking };
        let options = TestRunOptions { data_in: Some(admission.as_bytes()), ..TestRunOptions::default() };
        Ok(program.test_run(options)?.return_value)
    }

    /// Map handles for one worker; workers share the kernel's maps but no lock.
    pub fn maps(&self) -> Result<Maps, LoadError> {
        let again = |data: &MapData| -> Result<MapData, LoadError> {
            Ok(MapData::from_fd(data.fd().as_fd().try_clone_to_owned()?)?)
        };
        Ok(Maps {
            sources: Map::SockHash(again(&self.sources)?).try_into()?,
            targets: Map::SockHash(again(&self.targets)?).try_into()?,
            index: Map::HashMap(again(&self.index)?).try_into()?,
            tails: Map::HashMap(again(&self.tails)?).try_into()?,
            locals: Map::HashMap(again(&self.locals)?).try_into()?,
        })
    }

    /// The slots of all connections that can be steered.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// What wakes the tasks that wait for slots.
    pub(crate) fn events(&self) -> &Events {
        &self.events
    }
}

/// One worker's map handles. Keys are socket cookies, except in `tails`, whose key is the slot index.
pub struct Maps {
    pub sources: SockHash<MapData, u64>,
    pub targets: SockHash<MapData, u64>,
    pub index: HashMap<MapData, u64, u32>,
    pub tails: HashMap<MapData, u32, Ring>,
    /// Maps cookies of endpoints' own sockets to slot indices.
    pub locals: HashMap<MapData, u64, u32>,
}

/// The memory of a ring of last payload bytes (`penstock_common::tail`).
pub type Ring = [u8; penstock_common::tail::MEMORY];

/// Maps with one entry per connection that may be steered.
const MAPS_BY_FLOW: [&str; 11] = [
    "SOURCES",
    "TARGETS",
    "INDEX",
    "SLOTS",
    "TAILS",
    "LOCALS",
    "LOCAL_INDEX",
    "LOCAL_SLOTS",
    "PEERS",
    "FOUND",
    "NEIGHBOURS",
];
const OFFSETS: usize = size_of::<Offsets>() / size_of::<u32>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_pass_the_verifier() {
        let mut kernel = Kernel::load(64).expect("load");
        kernel.attach_local(&cgroup::root().expect("a cgroup v2 hierarchy")).expect("attach");
        kernel.maps().expect("maps");
        assert_eq!(kernel.slots().len(), 64);
    }
}
