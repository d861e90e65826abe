//! Resolves names to addresses asynchronously, by the system's resolver settings (`/etc/resolv.conf`, `/etc/hosts`) or
//! the servers of `[dns]`.
//!
//! An answer includes its validity, so that callers know when to look it up again. Nothing is cached here. Lookup tasks
//! run on the caller's runtime.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use thiserror::Error;

use crate::config;

/// Delay before the next lookup after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// The resolver. Cheap to clone.
#[derive(Clone)]
pub struct DnsResolver {
    resolver: Result<Arc<TokioResolver>, DnsError>,
    settings: config::Dns,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsAnswer {
    /// Sorted, without duplicates, not empty. If a name has both families, only IPv4 addresses, so that a server counts
    /// once.
    pub addresses: Vec<IpAddr>,
    /// Validity: the shortest TTL, within the bounds of `[dns]`.
    pub holds: Duration,
}

#[derive(Debug, Clone, Error)]
pub enum DnsError {
    #[error("cannot read the resolver settings: {0}")]
    Settings(NetError),
    #[error("{name}: {error}")]
    Lookup { name: String, error: NetError },
    #[error("{name}: the name has no address")]
    NoAddress { name: String },
    #[error("{name}: no answer within {after:?}")]
    Timeout { name: String, after: Duration },
}

impl DnsError {
    /// Label for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Settings(_) => "settings",
            Self::Lookup { .. } => "lookup",
            Self::NoAddress { .. } => "no_address",
            Self::Timeout { .. } => "timeout",
        }
    }
}

impl DnsResolver {
    /// Reads the system's settings, unless `[dns]` names servers. If the settings are invalid, every lookup returns
    /// that error.
    pub fn new(settings: &config::Dns) -> Self {
        let resolver = resolver(settings).map(Arc::new).map_err(DnsError::Settings);
        Self { resolver, settings: settings.clone() }
    }

    /// Resolves `host`, which may be an IP address. Takes at most `dns.timeout`.
    pub async fn resolve(&self, host: &str) -> Result<DnsAnswer, DnsError> {
        let resolver = self.resolver.as_ref().map_err(Clone::clone)?;
        let timeout = self.settings.timeout;
        let found = tokio::time::timeout(timeout, resolver.lookup_ip(host))
            .await
            .map_err(|_| DnsError::Timeout { name: host.to_owned(), after: timeout })?
            .map_err(|error| {
                let name = host.to_owned();
                if error.is_no_records_found() {
                    DnsError::NoAddress { name }
                } else {
                    DnsError::Lookup { name, error }
                }
            })?;
        let mut addresses: Vec<IpAddr> = found.iter().collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() {
            return Err(DnsError::NoAddress { name: host.to_owned() });
        }
        let ttl = found.valid_until().saturating_duration_since(Instant::now());
        Ok(DnsAnswer { addresses, holds: ttl.clamp(self.settings.min_ttl, self.settings.max_ttl) })
    }

    /// The minimum time between two lookups of one name.
    pub fn shortest(&self) -> Duration {
        self.settings.min_ttl
    }

    /// How long to wait after a failure before the next lookup.
    pub fn retry_after(&self) -> Duration {
        RETRY.clamp(self.settings.min_ttl, self.settings.max_ttl)
    }
}

fn resolver(settings: &config::Dns) -> Result<TokioResolver, NetError> {
    let mut builder = if settings.servers.is_empty() {
        TokioResolver::builder_tokio()?
    } else {
        let servers = settings.servers.iter().map(|&address| server(address)).collect();
        let config = ResolverConfig::from_parts(None, Vec::new(), servers);
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
    };
    let options = builder.options_mut();
    options.ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
    options.cache_size = 0;
    // Allows one retransmission within the time limit of a lookup.
    (options.attempts, options.timeout) = (2, settings.timeout / 3);
    builder.build()
}

fn server(address: SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    let ports = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    server.connections = server.connections.into_iter().map(ports).collect();
    server
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ip_address_resolves_to_itself() {
        let dns =
            DnsResolver::new(&config::Dns { servers: vec!["127.0.0.1:9".parse().unwrap()], ..config::Dns::default() });
        for (text, address) in [("10.0.0.7", "10.0.0.7"), ("fd00::7", "fd00::7")] {
            let answer = dns.resolve(text).await.unwrap();
            assert_eq!(answer.addresses, [address.parse::<IpAddr>().unwrap()]);
            assert_eq!(answer.holds, config::Dns::default().max_ttl);
        }
    }

    #[tokio::test]
    async fn silent_server_times_out() {
        // A bound but silent port, so that nothing else answers there.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let settings = config::Dns {
            servers: vec![silent.local_addr().unwrap()],
            timeout: Duration::from_millis(300),
            ..config::Dns::default()
        };
        let error = DnsResolver::new(&settings).resolve("models.test").await.unwrap_err();
        assert!(error.to_string().starts_with("models.test: "), "{error}");
    }
}
