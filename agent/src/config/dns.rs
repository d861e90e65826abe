//! `[dns]`: how names become addresses.

use std::{net::SocketAddr, time::Duration};

use super::{
    document::Section,
    settings::settings,
    value::{duration, endpoint},
};

settings! {
    /// How names become addresses.
    pub struct Dns {
        /// Servers to ask instead of those of `/etc/resolv.conf`; names are then taken as they are, without search domains.
        pub servers: Vec<SocketAddr> = Vec::new() => endpoint().list("an array of ip:port"),
        /// One lookup, with its repetitions.
        pub timeout: Duration = Duration::from_secs(5) => duration(),
        /// An answer holds at least this long, whatever its TTL.
        pub min_ttl: Duration = Duration::from_secs(1) => duration(),
        /// An answer holds at most this long, whatever its TTL.
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
