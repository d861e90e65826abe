//! Counters of agents, read from their metrics by path and reason, whatever their values.

use std::collections::BTreeMap;
use std::fmt;

/// Counts by label values (`ingress chunked`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// All samples of a counter.
    fn read(metrics: &str, name: &str) -> Self {
        let mut counts = Self::default();
        for line in metrics.lines() {
            let Some((labels, value)) =
                line.strip_prefix(name).and_then(|rest| rest.strip_prefix('{')).and_then(|rest| rest.rsplit_once("} "))
            else {
                continue;
            };
            let values: Vec<&str> = labels.split('"').skip(1).step_by(2).collect();
            *counts.0.entry(values.join(" ")).or_default() += value.parse::<f64>().unwrap_or_default() as u64;
        }
        counts
    }

    #[must_use]
    pub fn get(&self, labels: &str) -> u64 {
        self.0.get(labels).copied().unwrap_or_default()
    }

    #[must_use]
    pub fn sum(&self) -> u64 {
        self.0.values().sum()
    }

    fn add(&mut self, other: &Self) {
        for (labels, count) in &other.0 {
            *self.0.entry(labels.clone()).or_default() += count;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some: Vec<String> =
            self.0.iter().filter(|(_, count)| **count > 0).map(|(labels, count)| format!("{labels} {count}")).collect();
        f.write_str(if some.is_empty() { "none" } else { "" })?;
        f.write_str(&some.join(", "))
    }
}

/// The counters of one or more agents.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Body bytes, by path.
    pub bytes: Counts,
    /// Responses, by path and steering reason.
    pub flows: Counts,
    /// How often the kernel disarmed a flow early, by reason.
    pub stops: Counts,
    /// Requests, by pool, status and reason.
    pub requests: Counts,
}

impl Counters {
    #[must_use]
    pub fn read(metrics: &str) -> Self {
        let read = |name| Counts::read(metrics, name);
        Self {
            bytes: read("penstock_body_bytes_total"),
            flows: read("penstock_flows_total"),
            stops: read("penstock_steer_stops_total"),
            requests: read("penstock_requests_total"),
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.bytes.add(&other.bytes);
        self.flows.add(&other.flows);
        self.stops.add(&other.stops);
        self.requests.add(&other.requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_distinguished_by_value() {
        let metrics = "# TYPE x counter\n\
            penstock_flows_total{path=\"ingress\",reason=\"length\"} 2\n\
            penstock_flows_total{path=\"relay\",reason=\"small\"} 3\n\
            penstock_body_bytes_total{path=\"relay\"} 10\n";
        let mut counters = Counters::read(metrics);
        counters.add(&counters.clone());
        assert_eq!(counters.flows.to_string(), "ingress length 4, relay small 6");
        assert_eq!((counters.bytes.get("relay"), counters.bytes.get("ingress"), counters.flows.sum()), (20, 0, 10));
        assert_eq!(counters.stops.to_string(), "none");
    }
}
