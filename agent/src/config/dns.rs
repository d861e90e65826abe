//! `[dns]`: how names are resolved.

use std::{net::SocketAddr, time::Duration};

use super::{
    document::Section,
    settings::settings,
    value::{duration, endpoint},
};

settings! {
    /// How names are resolved.
    pub struct Dns {
        /// DNS servers to ask instead of those in `/etc/resolv.conf`. Search domains are then not applied.
        pub servers: Vec<SocketAddr> = Vec::new() => endpoint().list("an array of ip:port"),
        /// How long one lookup may take, including its retries.
        pub timeout: Duration = Duration::from_secs(5) => duration(),
        /// How long an answer is used at least, whatever its TTL.
        pub min_ttl: Duration = Duration::from_secs(1) => duration(),
        /// How long an answer is used at most, whatever its TTL.
        pub max_ttl: Duration = Duration::from_secs(300) => duration(),
    }
}

impl Dns {
    pub(super) fn check(&self, section: &Section<'_>) {
        if self.min_ttl > self.max_ttl {
            let key = if section.has("min_ttl") { "min_ttl" } else { "max_ttl" };
            section.reject(key, "a min_ttl above max_ttl", "min_ttl up to max_ttl");
        }
    }
}
