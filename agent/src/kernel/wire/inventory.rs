//! What agents have pinned in this network namespace: a list for `penstock doctor`, and its removal for `penstock detach`.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use penstock_common::wire::flow::{CLIENT, ENDPOINT, state};

use super::{
    Wire, WireError,
    adopted::peer,
    attach, inject,
    pins::{FoundFolder, Namespace},
    seen::{Seen, state_of},
    table::Table,
};
use crate::{config::Bpffs, kernel::socket::monotonic_ns};

/// The folder of an agent.
pub struct Pinned {
    /// Its path in the bpffs.
    pub folder: String,
    /// Its agent is alive.
    pub is_alive: bool,
    /// Its flows, or why they cannot be read.
    pub flows: Result<Vec<PinnedFlow>, String>,
}

/// A flow that has begun and not ended.
pub struct PinnedFlow {
    pub client: SocketAddr,
    pub endpoint: SocketAddr,
    pub bytes: u64,
    /// Time since the last payload.
    pub quiet: Duration,
}

/// What was removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Detached {
    pub instances: usize,
    pub flows: usize,
    /// Folders of agents that are alive, which were left alone.
    pub alive: Vec<String>,
}

/// The agents' folders in this network namespace.
pub fn pinned(place: &Bpffs) -> Result<Vec<Pinned>, WireError> {
    let Some(namespace) = Namespace::existing(place)? else { return Ok(Vec::new()) };
    let list = namespace.instances()?.into_iter().map(|one| match one {
        FoundFolder::Alive(folder) => Pinned { is_alive: true, flows: flows(Path::new(&folder)), folder },
        FoundFolder::Dead(instance) => {
            let flows = if instance.is_of_this_version() {
                flows(&instance.folder.at("."))
            } else {
                Err(format!("of another version ({})", instance.version))
            };
            Pinned { folder: instance.describe(), is_alive: false, flows }
        }
    });
    Ok(list.collect())
}

fn flows(folder: &Path) -> Result<Vec<PinnedFlow>, String> {
    let table = Table::pinned(folder).map_err(|error| error.reason())?;
    let now = monotonic_ns();
    let flow = |index| {
        let (seen, ends) = (Seen::of(table.words(index)), table.ends(index));
        let quiet = Duration::from_nanos(now.saturating_sub(seen.last_ns));
        PinnedFlow { client: peer(&ends[CLIENT]), endpoint: peer(&ends[ENDPOINT]), bytes: seen.bytes, quiet }
    };
    Ok(active(&table).map(flow).collect())
}

fn active(table: &Table) -> impl Iterator<Item = u32> {
    (0..table.len()).filter(|&index| state_of(table.words(index)) == state::ACTIVE && table.is_known(index))
}

/// Resets the peers of all flows whose agents are gone, and removes their programs, maps and folders.
pub fn detach(place: &Bpffs) -> Result<Detached, WireError> {
    let mut done = Detached::default();
    let Some(namespace) = Namespace::existing(place)? else { return Ok(done) };
    for one in namespace.instances()? {
        match one {
            FoundFolder::Alive(folder) => done.alive.push(folder),
            FoundFolder::Dead(instance) => {
                // Without its programs, this machine's TCP resets the peers of a flow that cannot be read.
                if instance.is_of_this_version()
                    && let Ok(table) = Table::pinned(&instance.folder.at("."))
                {
                    let wire = Arc::new(Wire::load(1)?);
                    for index in active(&table) {
                        inject::reset(&wire, &table, index);
                        done.flows += 1;
                    }
                }
                attach::remove(&instance, None)?;
                done.instances += 1;
            }
        }
    }
    namespace.tidy();
    Ok(done)
}
