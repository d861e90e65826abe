//! Fuzz targets: the agent's parsers of bytes from outside, compared with other parsers of the same bytes.
//!
//! Each module has a function `run`, which takes any bytes and panics if the code under test violates a property. The programs in
//! `fuzz_targets/` pass `run` to libFuzzer; `tests/corpus.rs` runs it on the inputs in `corpus/`. The reasons are in
//! docs/decisions/0007-fuzzing.md.

mod input;
pub mod peers;

pub mod request_head;
pub mod response_head;
pub mod http2_request;
pub mod body;
pub mod steered;
pub mod exchange;
pub mod configuration;
pub mod model_scan;
pub mod events;
pub mod wire;

/// The function of a fuzz target, which tests one input.
pub type Run = fn(&[u8]);

/// Every target, by the name of its program and of its folder in `corpus/`.
pub const TARGETS: [(&str, Run); 10] = [
    ("request_head", request_head::run),
    ("response_head", response_head::run),
    ("http2_request", http2_request::run),
    ("body", body::run),
    ("steered", steered::run),
    ("exchange", exchange::run),
    ("configuration", configuration::run),
    ("model_scan", model_scan::run),
    ("events", events::run),
    ("wire", wire::run),
];
