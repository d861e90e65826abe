//! `[node]`: where this agent runs.

use super::{settings::settings, value::non_empty};

settings! {
    /// Where this agent runs. `pools.subset.prefer` compares it with the node and zone of the endpoints.
    pub struct Node {
        /// Name of the node. `--node` and `PENSTOCK_NODE` override it.
        pub name: Option<String> = None => non_empty().optional("node-1"),
        /// Name of the zone. `--zone` and `PENSTOCK_ZONE` override it.
        pub zone: Option<String> = None => non_empty().optional("zone-a"),
    }
}
