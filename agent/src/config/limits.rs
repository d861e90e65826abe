//! `[limits]`: how large a message may be, and what all messages together may take.

use super::{document::Section, settings::settings, value::integer};

settings! {
    /// How large a message may be, and what all messages together may take. Sizes are bytes.
    pub struct Limits {
        /// Request or response head. More is 431 (request) or 502 (response).
        pub head_bytes: usize = 64 << 10 => integer(1024..=1 << 20),
        /// Header fields in a head. More is 431 (request) or 502 (response).
        pub headers: usize = 128 => integer(16..=1024).named("head_fields").was("headers"),
        /// Request body. More is 413.
        pub body_bytes: u64 = 32 << 20 => integer(1..=1 << 40),
        /// Part of a request body held in memory; the rest goes to an unlinked file.
        pub body_memory_bytes: usize = 1 << 20 => integer(0..=1 << 30),
        /// Memory that all request bodies together may take. Beyond it they go to files.
        pub total_body_bytes: u64 = 256 << 20
            => integer(0..=1 << 50).named("total_body_memory_bytes").was("total_body_bytes"),
        /// What all request bodies together may take in files. Beyond it requests are answered with 503. 0: there are no files, and
        /// `body_memory_bytes` is no limit.
        pub total_spill_bytes: u64 = 1 << 30 => integer(0..=1 << 50),
        /// A request body with a `Content-Encoding`, when it is decoded to find its model. One that is larger is 413 where a route
        /// needs the model, and passes without one elsewhere.
        pub decoded_body_bytes: u64 = 128 << 20 => integer(1..=1 << 40),
        /// Least rate of a request body, bytes a second: it may take `timeouts.body` and the time that it needs at this rate.
        /// 0: no limit.
        pub body_min_rate: u64 = 100 => integer(0..=1 << 30),
        /// Models that metrics tell apart, those named by requests and by responses together. What comes then counts as `other`,
        /// as does a name longer than 128 bytes. 0: every model does.
        pub metric_models: usize = 100 => integer(0..=10_000),
        /// Read and discarded of a client that sends on after its answer. Then its connection is reset.
        pub linger_bytes: u64 = 256 << 20 => integer(0..=1 << 40),
    }
}

impl Limits {
    pub(super) fn check(&self, section: &Section<'_>) {
        // The default of one must not turn a smaller value of the other into an error.
        if section.has("body_memory_bytes") && self.body_memory_bytes as u64 > self.body_bytes {
            let expected = format_args!("at most limits.body_bytes ({})", self.body_bytes);
            section.reject("body_memory_bytes", self.body_memory_bytes, expected);
        }
    }
}
