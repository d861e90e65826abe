//! `[node]`: where this agent runs.

use super::{Node, Overrides, document::Section, value};

pub(super) fn node(section: &mut Section<'_>, overrides: &Overrides) -> Node {
    let (name, zone) = (section.read("name", value::non_empty), section.read("zone", value::non_empty));
    Node { name: overrides.node.clone().or(name), zone: overrides.zone.clone().or(zone) }
}
