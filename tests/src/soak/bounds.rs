//! The limits of a soak run: an agent's growth since the warm-up, and its slowdown.

use std::fmt;
use std::time::Duration;

use super::footprint::Footprint;

/// With fewer samples in a third of the run, latencies are noise: printed, not judged.
const LEAST_SAMPLES: usize = 300;

/// The allowed growth since the warm-up.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Resident memory in bytes: pages kept by the allocator, and a fraction of the baseline.
    pub rss: u64,
    pub rss_part: f64,
    /// Descriptors: connections to the EPP, which each worker may or may not have at that moment.
    pub descriptors: usize,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { rss: 16 << 20, rss_part: 0.1, descriptors: 8 }
    }
}

impl Allowance {
    pub(super) fn complaints(&self, before: &Footprint, after: &Footprint) -> Vec<String> {
        let mut complaints = Vec::new();
        let most = before.rss + self.rss + (before.rss as f64 * self.rss_part) as u64;
        if after.rss > most {
            complaints.push(format!("memory grew from {} to {} KiB", before.rss >> 10, after.rss >> 10));
        }
        if after.descriptors > before.descriptors + self.descriptors {
            complaints.push(format!("descriptors grew from {} to {}", before.descriptors, after.descriptors));
        }
        // These must be zero while the agent is idle.
        for (what, count) in &after.entries {
            if *count > 0 {
                complaints.push(format!("{count} of {what} are left"));
            }
        }
        complaints
    }
}

/// Latencies in the first and the last third of a run.
#[derive(Clone, Debug)]
pub struct Drift {
    samples: usize,
    first: [Duration; 2],
    last: [Duration; 2],
}

impl Drift {
    /// Each sorted.
    pub(super) fn new(first: &[Duration], last: &[Duration]) -> Self {
        let quantile = |sorted: &[Duration], part: f64| {
            let at = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
            sorted.get(at).copied().unwrap_or_default()
        };
        let both = |sorted: &[Duration]| [0.5, 0.99].map(|part| quantile(sorted, part));
        Self { samples: first.len().min(last.len()), first: both(first), last: both(last) }
    }

    /// Allowed: the median plus half and 5 ms, the 99th percentile doubled plus 100 ms.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        if self.samples == 0 {
            return vec!["no latency was measured".to_owned()];
        }
        if self.samples < LEAST_SAMPLES {
            return Vec::new();
        }
        let bounds = [(1.5, Duration::from_millis(5)), (2.0, Duration::from_millis(100))];
        let slower = bounds.iter().zip(self.first.iter().zip(&self.last));
        let slower = slower.filter(|((part, more), (first, last))| **last > first.mul_f64(*part) + *more);
        slower.map(|_| format!("latency increased: {self}")).take(1).collect()
    }
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, first_tail] = self.first;
        let [last, last_tail] = self.last;
        write!(f, "p50 {first:.1?} then {last:.1?}, p99 {first_tail:.1?} then {last_tail:.1?} of {} each", self.samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footprint(rss: u64, descriptors: usize, entries: u64) -> Footprint {
        Footprint { rss, descriptors, entries: vec![("INDEX".to_owned(), entries)] }
    }

    #[test]
    fn growth_above_allowance_is_reported() {
        let allowance = Allowance::default();
        let before = footprint(100 << 20, 50, 0);
        assert!(allowance.complaints(&before, &footprint(120 << 20, 58, 0)).is_empty());
        assert_eq!(allowance.complaints(&before, &footprint(130 << 20, 59, 1)).len(), 3);
    }

    #[test]
    fn slower_final_phase_is_reported() {
        let of = |ms| vec![Duration::from_millis(ms); LEAST_SAMPLES];
        assert!(Drift::new(&of(10), &of(20)).complaints().is_empty());
        assert_eq!(Drift::new(&of(10), &of(21)).complaints().len(), 1);
        assert_eq!(Drift::new(&of(10), &[]).complaints().len(), 1, "none at the end");
        assert!(Drift::new(&of(10)[1..], &of(90)).complaints().is_empty(), "too few to judge");
    }
}
