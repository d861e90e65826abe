//! Memory of the agent's process and of the machine at one moment.

use penstock_tests::agent_process::AgentProcess;

/// Bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Of the agent's process.
    pub(crate) rss: u64,
    pub(crate) available: u64,
    /// The kernel's own pages including unreclaimable slab, which hold socket buffers.
    pub(crate) kernel: u64,
    /// What sockets are charged for (`/proc/net/sockstat`).
    pub(crate) sockets: u64,
}

impl Memory {
    pub(crate) fn now(agent: &AgentProcess) -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        let others = ["MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "SReclaimable", "PageTables"];
        let kernel = field("MemTotal") - others.iter().map(|name| field(name)).sum::<u64>();
        let sockstat = std::fs::read_to_string("/proc/net/sockstat").unwrap();
        let tcp = sockstat.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
        let pages: u64 = tcp.rsplit(' ').next().and_then(|pages| pages.parse().ok()).unwrap_or(0);
        Self { rss: agent.process.rss().unwrap(), available: field("MemAvailable"), kernel, sockets: pages * 4096 }
    }
}
