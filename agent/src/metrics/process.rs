//! Metrics of the process (its log and its panics), counted once even if several agents run in it.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use crate::{logging::DropReason, panics};

#[derive(Debug)]
pub(super) struct ProcessCollector;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByThreadAndPlace {
    thread: String,
    place: String,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Log lines that were dropped because the queue was full or they were too long.";
        let mut family = encoder.encode_descriptor("log_lines_dropped", help, None, MetricType::Counter)?;
        for reason in DropReason::ALL {
            let labels = [("reason", reason.label())];
            ConstCounter::new(reason.lines()).encode(family.encode_family(&labels)?)?;
        }
        let panics = panics::seen();
        if panics.is_empty() {
            return Ok(());
        }
        let help = "Panics, by thread and source location.";
        let mut family = encoder.encode_descriptor("panics", help, None, MetricType::Counter)?;
        for (place, count) in panics {
            let labels = ByThreadAndPlace { thread: place.thread, place: place.at };
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
