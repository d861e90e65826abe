//! `[pools.subset]`: the part of a pool that requests are to stay in.

use std::net::SocketAddr;

use serde_json::json;

use super::{
    document::Section,
    node::Node,
    settings::{choice, settings},
    value::{self, endpoint},
};

settings! {
    /// The part of the pool that requests are to stay in: the EPP gets it as a hint, the built-in picker keeps to it. A pick from
    /// outside the subset is followed.
    pub struct Subset {
        /// The first of these that has an endpoint ready where this agent is. Without one, the whole pool.
        pub prefer: Vec<Locality> = Vec::new()
            => value::choice().list(r#"an array of "node" and "zone""#).example(json!(["node", "zone"])),
        /// Instead of `prefer`: these endpoints and no others are the subset.
        pub endpoints: Vec<SocketAddr> = Vec::new()
            => endpoint().list("an array of ip:port").example(json!(["127.0.0.1:8000"])),
        /// What an empty subset means.
        pub empty: EmptySubset = EmptySubset::All => value::choice(),
    }
}

choice! {
    /// What an endpoint has in common with the agent.
    pub enum Locality {
        /// Endpoints with the agent's `node.name`.
        Node = "node",
        /// Endpoints with the agent's `node.zone`.
        Zone = "zone",
    }
}

choice! {
    /// What an empty subset means.
    pub enum EmptySubset {
        /// The whole pool: the EPP gets no hint.
        All = "all",
        /// Nothing: the EPP gets the empty list and answers 503, as the built-in picker does.
        Fail = "fail",
    }
}

impl Subset {
    pub(super) fn check(&self, section: &Section<'_>, node: &Node) {
        if !self.prefer.is_empty() && !self.endpoints.is_empty() {
            section.reject("endpoints", "a second way to choose the subset", "prefer or endpoints");
        }
        for (index, locality) in self.prefer.iter().enumerate() {
            let (own, found, expected) = match locality {
                Locality::Node => (&node.name, r#""node" without node.name"#, "node.name, --node or PENSTOCK_NODE"),
                Locality::Zone => (&node.zone, r#""zone" without node.zone"#, "node.zone, --zone or PENSTOCK_ZONE"),
            };
            if own.is_none() {
                section.reject(&format!("prefer[{index}]"), found, expected);
            }
        }
    }
}
