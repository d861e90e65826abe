//! `[pools.subset]`: the endpoints of a pool that are preferred for requests.

use std::net::SocketAddr;

use serde_json::json;

use super::{
    document::Section,
    node::Node,
    settings::{choice, settings},
    value::{self, endpoint},
};

settings! {
    /// The endpoints that are preferred for requests: an EPP gets them as a hint, the built-in picker chooses among them. If the
    /// EPP picks an endpoint outside of the subset, the request goes there.
    pub struct Subset {
        /// Localities in order of preference. The subset is the agent's node or zone, whichever comes first and has an endpoint
        /// that is not avoided.
        pub prefer: Vec<Locality> = Vec::new()
            => value::choice().list(r#"an array of "node" and "zone""#).example(json!(["node", "zone"])),
        /// The endpoints of the subset, instead of `prefer`.
        pub endpoints: Vec<SocketAddr> = Vec::new()
            => endpoint().list("an array of ip:port").example(json!(["127.0.0.1:8000"])),
        /// What happens if the subset is empty. With `prefer`, `"all"` also applies if all of its endpoints are avoided.
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
        /// The whole pool is used: the EPP gets no hint.
        All = "all",
        /// Requests are answered with 503: by an EPP, which gets an empty list, or by the built-in picker.
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
