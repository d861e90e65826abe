//! `[node]`: where this agent runs.

use super::{settings::settings, value::non_empty};

settings! {
    /// Where this agent runs, in the words that endpoints use; `prefer` of a pool's subset compares the two.
    pub struct Node {
        /// The node. `PENSTOCK_NODE` and `--node` win over it.
        pub name: Option<String> = None => non_empty().optional("node-1"),
        /// The zone. `PENSTOCK_ZONE` and `--zone` win over it.
        pub zone: Option<String> = None => non_empty().optional("zone-a"),
    }
}
