//! The precedence of matches, as the Gateway API defines it: the more specific host, then an exact path, the longer prefix, a
//! method, more headers, more parameters, the older HTTPRoute, its name, and its own order.

use std::cmp::Reverse;

use super::{objects::ApiObject, rule::TranslatedMatch};
use crate::config::{HostPattern, PathPattern};

/// Sorts first what wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Precedence {
    /// Listeners are sorted by their hosts, so this is the first part of the host's precedence.
    pub(super) listener: usize,
    host: HostRank,
    path: (u8, Reverse<usize>),
    has_no_method: bool,
    headers: Reverse<usize>,
    query: Reverse<usize>,
    created: String,
    key: String,
    rule: usize,
}

/// First hosts without wildcard, then longer ones.
pub(super) type HostRank = (u8, Reverse<usize>);

pub(super) fn by_host(host: Option<&HostPattern>) -> HostRank {
    match host {
        Some(HostPattern::Exact(name)) => (0, Reverse(name.len())),
        Some(HostPattern::Below(name)) => (1, Reverse(name.len())),
        None => (2, Reverse(0)),
    }
}

impl Precedence {
    pub(super) fn new(
        listener: usize,
        host: Option<&HostPattern>,
        translated: &TranslatedMatch,
        route: &ApiObject,
        rule: usize,
    ) -> Self {
        let path = match &translated.route.path {
            Some(PathPattern::Exact(path)) => (0, Reverse(path.len())),
            Some(PathPattern::Prefix(path)) => (1, Reverse(path.len())),
            // A match that is not implemented. It comes last, so that it takes no request of another route.
            None => (2, Reverse(0)),
        };
        Self {
            listener,
            host: by_host(host),
            path,
            has_no_method: translated.route.methods.is_empty(),
            headers: Reverse(translated.route.headers.len()),
            query: Reverse(translated.route.query.len()),
            created: route.metadata.creation_timestamp.clone(),
            key: route.key(),
            rule,
        }
    }
}
