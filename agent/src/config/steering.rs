//! `[steering]`: which response bodies the kernel moves.

use std::path::PathBuf;

use super::{
    document::Section,
    settings::{choice, settings},
    value::{self, Value, integer},
};

const MIB: u32 = 1 << 20;

settings! {
    /// Which response bodies the kernel moves, and how.
    pub struct Steering {
        /// Which path moves response bodies. `--steering` and `PENSTOCK_STEERING` override it.
        pub mode: SteeringMode = SteeringMode::Auto => value::choice(),
        /// Mount point of the cgroup v2 hierarchy that contains the endpoints on this machine. `"auto"` takes it from
        /// `/proc/mounts`.
        pub cgroup: Option<PathBuf> = None => cgroup(),
        /// With `mode = "auto"`: bodies with a Content-Length below this many bytes are relayed.
        pub min_bytes: u64 = 16 << 10 => integer(0..=1 << 40),
        /// With `mode = "auto"`: bodies of more than this many bytes from an endpoint on another machine are relayed (they arrive
        /// in small fragments, each of which is redirected separately). 0, or at least `min_bytes`.
        pub max_remote_bytes: u64 = 64 << 10 => integer(0..=1 << 40),
        /// Send buffer (SO_SNDBUF) of a client connection whose response is steered, in bytes.
        // The kernel keeps 16 KiB of a send buffer free (`SendBuffer::has_room`), so a buffer of that size would prevent steering.
        pub client_send_buffer: u32 = 1 << 20 => integer(32_768..=64 * MIB),
        /// Receive buffer (SO_RCVBUF) of an endpoint connection, in bytes.
        pub endpoint_receive_buffer: u32 = 512 << 10 => integer(16_384..=64 * MIB),
        /// Maximum number of connections that can be steered at once: to endpoints, and the clients of upgraded and pinned ones. A
        /// connection that has closed may count for two more seconds, so that few slots steer fewer. Determines the size of the
        /// kernel maps.
        pub max_flows: u32 = 16_384 => integer(1..=1_048_576),
        /// With `mode = "wire"`: names of the network interfaces towards clients and endpoints, separated by commas. `"auto"` means
        /// every Ethernet interface that exists at the start.
        pub interfaces: Interfaces = Interfaces::Auto => interfaces(),
        /// With `mode = "wire"`: mount point of a bpffs, where the agent pins its programs and maps, so that flows outlive it and the
        /// next agent adopts them. `"auto"` is `/run/penstock/bpf` or `/sys/fs/bpf`, the first of them that is a bpffs; without one,
        /// flows end with the agent. `"off"`: flows end with the agent.
        pub bpffs: Bpffs = Bpffs::Auto => bpffs(),
        /// With `mode = "wire"` and a bpffs: what happens to flows that have begun when the agent is told to stop.
        pub at_stop: AtStop = AtStop::Auto => value::choice(),
        /// Whether to steer on a kernel version that is known to lose or repeat bytes in sockmap. `--force` and
        /// `PENSTOCK_FORCE=true` enable it, too.
        pub force: bool = false => value::boolean(),
    }
}

choice! {
    /// Which path moves response bodies.
    #[derive(clap::ValueEnum)]
    pub enum SteeringMode {
        /// The best path that passed its self-test, for bodies where steering pays off.
        Auto = "auto",
        /// The `local` path for every body from an endpoint on this machine, whatever its size. All others are relayed.
        Local = "local",
        /// The `ingress` path for every body that can be steered, whatever its size.
        Ingress = "ingress",
        /// All bodies are relayed in user space.
        Off = "off",
        /// The `wire` path for streams from endpoints on other machines: packets are rewritten between the endpoint and the client.
        /// All others are relayed. On trial: `"auto"` does not use it, and docs/limits.md says what it lacks.
        Wire = "wire",
    }
}

choice! {
    /// What happens to flows of path `wire` when the agent stops.
    pub enum AtStop {
        /// `"leave"` in the network namespace that the machine started with, which outlives the agent, otherwise `"finish"`.
        Auto = "auto",
        /// The kernel carries them on, and the next agent adopts them.
        Leave = "leave",
        /// They may end within `timeouts.drain`, then they are reset.
        Finish = "finish",
    }
}

/// Where path `wire` pins its programs and maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bpffs {
    /// In `/run/penstock/bpf` or `/sys/fs/bpf`, the first of them that is a bpffs; nowhere if neither is.
    Auto,
    /// Nowhere: flows end with the agent.
    Off,
    /// In the bpffs that is mounted here, an absolute path.
    At(PathBuf),
}

fn bpffs() -> Value<Bpffs> {
    let parse = |text: &str| match text {
        "auto" => Some(Bpffs::Auto),
        "off" => Some(Bpffs::Off),
        path => path.starts_with('/').then(|| Bpffs::At(path.into())),
    };
    let show = |place: &Bpffs| match place {
        Bpffs::Auto => "auto".to_owned(),
        Bpffs::Off => "off".to_owned(),
        Bpffs::At(path) => path.display().to_string(),
    };
    Value::text("\"auto\", \"off\" or an absolute path", parse, show)
}

/// The interfaces of path `wire`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interfaces {
    /// Every Ethernet interface that exists at the start.
    Auto,
    /// These, each with a name of 1 to 15 bytes.
    Named(Vec<String>),
}

fn interfaces() -> Value<Interfaces> {
    let parse = |text: &str| match text {
        "auto" => Some(Interfaces::Auto),
        names => {
            let names: Vec<_> = names.split(',').map(|name| name.trim().to_owned()).collect();
            // The kernel's limit is 15 bytes (IFNAMSIZ).
            names.iter().all(|name| (1..16).contains(&name.len())).then_some(Interfaces::Named(names))
        }
    };
    let show = |interfaces: &Interfaces| match interfaces {
        Interfaces::Auto => "auto".to_owned(),
        Interfaces::Named(names) => names.join(","),
    };
    Value::text("\"auto\" or names of interfaces, separated by commas", parse, show)
}

fn cgroup() -> Value<Option<PathBuf>> {
    let parse = |text: &str| (!text.is_empty()).then(|| (text != "auto").then(|| PathBuf::from(text)));
    let show = |path: &Option<PathBuf>| path.as_ref().map_or("auto".to_owned(), |path| path.display().to_string());
    Value::text("a string that is not empty", parse, show)
}

impl Steering {
    pub(super) fn check(&self, section: &Section<'_>) {
        // 0 means that nothing remote is steered. Any other value below `min_bytes` contradicts it.
        if (1..self.min_bytes).contains(&self.max_remote_bytes) {
            let expected = format_args!("0, or at least steering.min_bytes ({})", self.min_bytes);
            section.reject("max_remote_bytes", self.max_remote_bytes, expected);
        }
    }
}
