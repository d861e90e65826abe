//! Parses the endpoints that an EPP returns: a comma-separated list of `ip:port`.
//!
//! Takes the list and a test for the pool's members; returns the valid addresses in order and the invalid entries. An IPv6 address
//! without brackets is accepted if it is a member or has all eight groups. An IPv4-mapped address becomes the IPv4 address.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Most endpoints of one list. More are dropped, because dispatch may try each of them.
const MAX_ENDPOINTS: usize = 64;
/// How many bytes of invalid entries are kept for the log.
const SHOWN: usize = 200;

/// A parsed list of endpoints.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct EndpointNames {
    /// The valid endpoints, without duplicates.
    pub endpoints: Vec<SocketAddr>,
    pub invalid: InvalidEntries,
}

/// Invalid entries.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct InvalidEntries {
    pub count: usize,
    /// The first of them, escaped and cut.
    pub shown: String,
}

impl EndpointNames {
    /// Parses `list`. `is_member` tells whether the pool has an endpoint. Empty entries are ignored.
    pub fn parse(list: &str, is_member: impl Fn(SocketAddr) -> bool) -> Self {
        let mut names = Self::default();
        for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            match address(entry, &is_member) {
                Some(endpoint) if names.endpoints.len() < MAX_ENDPOINTS => {
                    if !names.endpoints.contains(&endpoint) {
                        names.endpoints.push(endpoint);
                    }
                }
                Some(_) => {}
                None => names.invalid.add(entry),
            }
        }
        names
    }
}

impl InvalidEntries {
    fn add(&mut self, entry: &str) {
        self.count += 1;
        let room = SHOWN.saturating_sub(self.shown.len());
        if room > 0 {
            let separator = if self.shown.is_empty() { "" } else { ", " };
            let shown: String = entry.chars().take(room).flat_map(char::escape_debug).collect();
            self.shown = format!("{}{separator}{shown}", self.shown);
        }
    }
}

fn address(entry: &str, is_member: impl Fn(SocketAddr) -> bool) -> Option<SocketAddr> {
    // A zone is valid on one machine only.
    if entry.contains('%') {
        return None;
    }
    let named = match entry.parse::<SocketAddr>() {
        Ok(address) => address,
        Err(_) => bare(entry, &is_member)?,
    };
    let (ip, port) = (named.ip(), named.port());
    let canonical = ip.to_canonical();
    let broadcast = matches!(canonical, IpAddr::V4(ip) if ip.is_broadcast());
    if port == 0 || canonical.is_unspecified() || canonical.is_multicast() || broadcast {
        return None;
    }
    let named = SocketAddr::new(ip, port);
    Some(if is_member(named) { named } else { SocketAddr::new(canonical, port) })
}

/// Parses IPv6 without brackets, with the port after the last colon.
fn bare(entry: &str, is_member: impl Fn(SocketAddr) -> bool) -> Option<SocketAddr> {
    let (host, port) = entry.rsplit_once(':')?;
    let ip: Ipv6Addr = host.parse().ok()?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let address = SocketAddr::new(ip.into(), port.parse().ok().filter(|_| digits)?);
    let groups = host.split(':').count() + usize::from(host.contains('.'));
    let is_full = groups == 8 && !host.contains("::");
    (is_full || is_member(address)).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBERS: [&str; 3] = ["10.0.0.7:8000", "[fd00:0:0:8::5]:8000", "[::ffff:10.0.0.9]:8000"];

    fn named(list: &str) -> (Vec<String>, usize) {
        let members: Vec<SocketAddr> = MEMBERS.iter().map(|member| member.parse().unwrap()).collect();
        let names = EndpointNames::parse(list, |address| members.contains(&address));
        (names.endpoints.iter().map(ToString::to_string).collect(), names.invalid.count)
    }

    #[test]
    fn invalid_entries_are_skipped() {
        let cases: [(&str, &[&str], usize); 14] = [
            ("pod-7:8000,10.0.0.7:8000", &["10.0.0.7:8000"], 1),
            ("10.0.0.7:8000,127.0.0.1:99999", &["10.0.0.7:8000"], 1),
            (" 10.0.0.7:8000 ,\t10.0.0.8:8000 ,", &["10.0.0.7:8000", "10.0.0.8:8000"], 0),
            (",,10.0.0.7:8000,,", &["10.0.0.7:8000"], 0),
            ("10.0.0.7:8000,10.0.0.7:8000", &["10.0.0.7:8000"], 0),
            ("10.0.0.7:0,10.0.0.7,:8000,10.0.0.7:,10.0.0.7:+80,[::1]", &[], 6),
            ("0.0.0.0:8000,[::]:8000,224.0.0.1:80,255.255.255.255:80,[ff02::1]:80", &[], 5),
            ("[fe80::1%eth0]:8000,[fe80::1%2]:8000,fe80:0:0:0:0:0:0:1%2:8000", &[], 3),
            ("[::ffff:10.0.0.7]:8000", &["10.0.0.7:8000"], 0),
            ("[::ffff:10.0.0.9]:8000", &["[::ffff:10.0.0.9]:8000"], 0),
            ("::ffff:10.0.0.7:8000", &[], 1),
            ("0:0:0:0:0:ffff:10.0.0.7:8000", &["10.0.0.7:8000"], 0),
            ("010.0.0.7:8000,10.0.0.7:8000:1,10.0.0.7:80 00", &[], 3),
            ("", &[], 0),
        ];
        for (list, endpoints, bad) in cases {
            let (found, found_bad) = named(list);
            assert_eq!(
                (found.iter().map(String::as_str).collect::<Vec<_>>(), found_bad),
                (endpoints.to_vec(), bad),
                "{list}"
            );
        }
    }

    #[test]
    fn bare_ipv6_has_to_be_a_member_or_have_all_groups() {
        assert_eq!(named("fd00:0:0:8::5:8000"), (vec!["[fd00:0:0:8::5]:8000".to_owned()], 0));
        // Another spelling of the same member.
        assert_eq!(named("fd00::8:0:0:0:5:8000").0, ["[fd00:0:0:8::5]:8000"]);
        assert_eq!(named("fd00:0:0:8:0:0:0:6:8000").0, ["[fd00:0:0:8::6]:8000"]);
        // Ambiguous: 8000 could be the last group of the address.
        assert_eq!(named("fd00:0:0:8::6:8000"), (vec![], 1));
        assert_eq!(named("fd00:0:0:8:0:0:0:8000"), (vec![], 1));
    }

    #[test]
    fn long_lists_are_cut() {
        let list: Vec<String> = (0..1000).map(|n| format!("10.0.{}.{}:80", n / 250, n % 250 + 1)).collect();
        assert_eq!(named(&list.join(",")).0.len(), MAX_ENDPOINTS);
        let names = EndpointNames::parse(&"é\n".repeat(10_000), |_| false);
        assert!(names.invalid.count == 1 && names.invalid.shown.len() < 1000);
    }
}
