//! `[steering]`: which response bodies the kernel moves.

use std::path::PathBuf;

use super::{
    document::Section,
    settings::{choice, settings},
    value::{self, Value, integer},
};

const MIB: u32 = 1 << 20;

settings! {
    /// Which response bodies the kernel moves, and with what.
    pub struct Steering {
        /// `PENSTOCK_STEERING` and `--steering` win over it.
        pub mode: SteeringMode = SteeringMode::Auto => value::choice(),
        /// Where the cgroup v2 hierarchy is mounted that the endpoints on this machine live in. `auto`: as `/proc/mounts` says.
        pub cgroup: Option<PathBuf> = None => cgroup(),
        /// In `auto`, bodies with a Content-Length below this are relayed.
        pub min_bytes: u64 = 16 << 10 => integer(0..=1 << 40),
        /// In `auto`, bodies above this from an endpoint on another machine are relayed (they arrive in small fragments, which
        /// redirect one by one). 0, or at least `min_bytes`.
        pub max_remote_bytes: u64 = 64 << 10 => integer(0..=1 << 40),
        /// SO_SNDBUF of a client connection whose response is steered, bytes.
        // The kernel keeps 16 KiB of a send buffer free (`SendBuffer::has_room`): with no more than that nothing would be steered.
        pub client_send_buffer: u32 = 1 << 20 => integer(32_768..=64 * MIB),
        /// SO_RCVBUF of an endpoint connection, bytes.
        pub endpoint_receive_buffer: u32 = 512 << 10 => integer(16_384..=64 * MIB),
        /// Endpoint connections that can be steered at once. Sizes the kernel maps.
        pub max_flows: u32 = 16_384 => integer(1..=1_048_576),
        /// Steer also on a kernel whose version is known to lose or repeat bytes in sockmap. `PENSTOCK_FORCE=true` and `--force`
        /// say so too.
        pub force: bool = false => value::boolean(),
    }
}

choice! {
    /// Which path moves response bodies.
    #[derive(clap::ValueEnum)]
    pub enum SteeringMode {
        /// The best path that passed its self-test, where it pays.
        Auto = "auto",
        /// The local path for everything that an endpoint on this machine sends, whatever its size, and user space for the rest.
        Local = "local",
        /// The ingress path for everything that can be steered, whatever its size.
        Ingress = "ingress",
        /// User space carries every byte.
        Off = "off",
    }
}

fn cgroup() -> Value<Option<PathBuf>> {
    let parse = |text: &str| (!text.is_empty()).then(|| (text != "auto").then(|| PathBuf::from(text)));
    let show = |path: &Option<PathBuf>| path.as_ref().map_or("auto".to_owned(), |path| path.display().to_string());
    Value::text("a text that is not empty", parse, show)
}

impl Steering {
    pub(super) fn check(&self, section: &Section<'_>) {
        // 0 is the way to say "nothing remote"; between 0 and min_bytes the two only contradict each other.
        if (1..self.min_bytes).contains(&self.max_remote_bytes) {
            let expected = format_args!("0, or at least steering.min_bytes ({})", self.min_bytes);
            section.reject("max_remote_bytes", self.max_remote_bytes, expected);
        }
    }
}
