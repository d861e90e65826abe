//! `[limits]`: limits of single messages and of all messages together.

use super::{document::Section, settings::settings, value::integer};

settings! {
    /// Limits of single messages and of all messages together. Sizes are in bytes.
    pub struct Limits {
        /// Maximum size of a request or response head. A larger request head is answered with 431, a larger response head with 502.
        pub head_bytes: usize = 64 << 10 => integer(1024..=1 << 20),
        /// Maximum number of fields in a head. A request with more is answered with 431, a response with more is replaced by 502.
        pub headers: usize = 128 => integer(16..=1024).named("head_fields").was("headers"),
        /// Maximum size of a request body. A larger one is answered with 413.
        pub body_bytes: u64 = 32 << 20 => integer(1..=1 << 40),
        /// Maximum size of one request body in memory. The rest is spilled to an unlinked file.
        pub body_memory_bytes: usize = 1 << 20 => integer(0..=1 << 30),
        /// Maximum memory of all request bodies together. Beyond it, bodies are spilled to files. JSON responses that are kept for an
        /// EPP count, too; beyond it the EPP gets their end alone.
        pub total_body_bytes: u64 = 256 << 20
            => integer(0..=1 << 50).named("total_body_memory_bytes").was("total_body_bytes"),
        /// Maximum size of all spilled request bodies together. Beyond it, requests are answered with 503. 0 disables spilling;
        /// `body_memory_bytes` then has no effect.
        pub total_spill_bytes: u64 = 1 << 30 => integer(0..=1 << 50),
        /// Maximum decoded size of a request body with a `Content-Encoding`, which is decoded to find its model. A larger one is
        /// answered with 413 if a route needs the model, and is forwarded without a model otherwise.
        pub decoded_body_bytes: u64 = 128 << 20 => integer(1..=1 << 40),
        /// Minimum rate of a request body in bytes per second: a body may take `timeouts.body` plus its size divided by this rate.
        /// 0 disables the limit.
        pub body_min_rate: u64 = 100 => integer(0..=1 << 30),
        /// Maximum number of distinct models in metric labels, from requests and responses together. Further models, and names
        /// longer than 128 bytes, are counted as `other`. 0 counts every model as `other`.
        pub metric_models: usize = 100 => integer(0..=10_000),
        /// Maximum number of bytes that are read and discarded from a client that continues to send after its response. Beyond it,
        /// its connection is reset.
        pub linger_bytes: u64 = 256 << 20 => integer(0..=1 << 40),
    }
}

impl Limits {
    pub(super) fn check(&self, section: &Section<'_>) {
        // A `body_bytes` below the default of `body_memory_bytes` is not an error.
        if section.has("body_memory_bytes") && self.body_memory_bytes as u64 > self.body_bytes {
            let expected = format_args!("at most limits.body_bytes ({})", self.body_bytes);
            section.reject("body_memory_bytes", self.body_memory_bytes, expected);
        }
    }
}
