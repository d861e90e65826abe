//! `[pools.subset]`: the part of a pool that requests are to stay in.

use super::{EmptySubset, Locality, Node, Subset, document::Section, value};

pub(super) fn subset(section: &mut Section<'_>, node: &Node) -> Subset {
    const LOCALITIES: &[(&str, Locality)] = &[("node", Locality::Node), ("zone", Locality::Zone)];
    const EMPTY: &[(&str, EmptySubset)] = &[("all", EmptySubset::All), ("fail", EmptySubset::Fail)];
    let subset = Subset {
        prefer: section.list("prefer", r#"an array of "node" and "zone""#, value::one_of(LOCALITIES)),
        endpoints: section.list("endpoints", "an array of ip:port", value::endpoint),
        empty: section.read("empty", value::one_of(EMPTY)).unwrap_or_default(),
    };
    if !subset.prefer.is_empty() && !subset.endpoints.is_empty() {
        section.reject("endpoints", "a second way to choose the subset", "prefer or endpoints");
    }
    for (index, locality) in subset.prefer.iter().enumerate() {
        let (own, found, expected) = match locality {
            Locality::Node => (&node.name, r#""node" without node.name"#, "node.name, --node or PENSTOCK_NODE"),
            Locality::Zone => (&node.zone, r#""zone" without node.zone"#, "node.zone, --zone or PENSTOCK_ZONE"),
        };
        if own.is_none() {
            section.reject(&format!("prefer[{index}]"), found, expected);
        }
    }
    subset
}
