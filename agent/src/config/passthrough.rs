//! `passthrough`: which endpoints an EPP may name that are not in the pool.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::json;
use toml::de::DeValue;

use super::value::{Custom, Expected, Value};

/// Which addresses outside of the pool an EPP may pick.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Passthrough {
    /// None.
    #[default]
    Off,
    /// All addresses except loopback, link-local, unspecified, multicast and broadcast ones, also as IPv6 forms of IPv4 addresses.
    On,
    /// Exactly these.
    Networks(Vec<Network>),
}

/// The addresses with a common prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// The address at which AWS serves metadata over IPv6. Other clouds use link-local addresses.
const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

impl Passthrough {
    /// Whether only endpoints of the pool may be picked.
    pub(crate) fn is_off(&self) -> bool {
        *self == Self::Off
    }

    /// Whether the EPP may pick this address outside of the pool. IPv4-mapped addresses count as IPv4.
    pub(crate) fn admits(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        match self {
            Self::Off => false,
            Self::On => is_remote(ip),
            Self::Networks(networks) => networks.iter().any(|network| network.contains(ip)),
        }
    }
}

fn is_remote(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let this_network = ip.octets()[0] == 0;
            !(this_network || ip.is_loopback() || ip.is_link_local() || ip.is_multicast() || ip.is_broadcast())
        }
        IpAddr::V6(ip) => {
            let kept = ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast();
            let mut carried = embedded(ip).into_iter().chain(translated(ip));
            !(kept || ip == METADATA) && carried.all(|ip| is_remote(ip.into()))
        }
    }
}

/// The IPv4 address that an IPv6 address is routed to: IPv4-compatible, NAT64 (RFC 6052), 6to4 (RFC 3056) and Teredo (RFC 4380, where
/// the bits of the client's address are inverted).
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let of = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            Some(of(high, low))
        }
        [0x2001, 0, .., high, low] => Some(of(!high, !low)),
        _ => None,
    }
}

/// The IPv4 addresses that an address of 64:ff9b:1::/48 (RFC 8215) may be routed to. The length of the translator's prefix is unknown;
/// these are the layouts of RFC 6052 §2.2 whose suffix is zero.
fn translated(ip: Ipv6Addr) -> Vec<Ipv4Addr> {
    let octets = ip.octets();
    if !octets.starts_with(&[0, 0x64, 0xff, 0x9b, 0, 1]) {
        return Vec::new();
    }
    // Octet 8 is zero in all of them and not a part of the address.
    let is_short = octets[8] == 0 && octets[13..] == [0; 3];
    let layouts = [([6, 7, 9, 10], 11), ([7, 9, 10, 11], 12), ([9, 10, 11, 12], 13)];
    let fits = layouts.into_iter().filter(|&(_, end)| is_short && octets[end..].iter().all(|&octet| octet == 0));
    let short = fits.map(|(places, _)| places);
    let long = [[12, 13, 14, 15]].into_iter().filter(|_| !is_short);
    let addresses = short.chain(long).map(|places| Ipv4Addr::from(places.map(|place| octets[place])));
    // No host has such an address: the prefix is shorter.
    addresses.filter(|ip| !is_short || ip.octets()[0] != 0).collect()
}

impl Network {
    /// Parses `10.0.0.0/8` or a single address. Returns `None` for anything else, and if bits after the prefix are set.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let digits = |prefix: &&str| !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix = match prefix {
            Some(prefix) => Some(prefix).filter(digits)?.parse().ok().filter(|prefix| *prefix <= bits)?,
            None => bits,
        };
        let network = Self { address, prefix };
        (network.masked(address) == Some(bits_of(address))).then_some(network)
    }

    /// Whether the address has the prefix. IPv4 and IPv6 are not mapped to each other.
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        self.address.is_ipv4() == ip.is_ipv4() && self.masked(ip) == Some(bits_of(self.address))
    }

    /// The bits of `ip` that the prefix covers.
    fn masked(&self, ip: IpAddr) -> Option<u128> {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let rest = u32::from(bits - self.prefix.min(bits));
        let ones = u128::MAX.checked_shl(rest).unwrap_or(0);
        Some(bits_of(ip) & ones)
    }
}

fn bits_of(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

const WORDS: &str = r#"true, false, or an array of networks such as ["10.0.0.0/8"]"#;

fn network() -> Value<Network> {
    let words = r#"a network such as "10.0.0.0/8", whose address has no bits after the prefix, or an IP address"#;
    Value::text(words, Network::parse, written)
}

fn written(network: &Network) -> String {
    format!("{}/{}", network.address, network.prefix)
}

pub(super) fn passthrough() -> Custom<Passthrough> {
    Custom {
        words: WORDS,
        schema: json!({ "anyOf": [
            { "type": "boolean" },
            { "type": "array", "items": { "type": "string" }, "minItems": 1 },
        ] }),
        read: |section, key| {
            if section.has_array(key) {
                let networks = section.list(key, WORDS, |value| network().parse(value));
                if section.is_empty_array(key) {
                    section.reject(key, "an empty array", WORDS);
                }
                return Some(Passthrough::Networks(networks));
            }
            let parse = |value: &DeValue<'_>| match value {
                DeValue::Boolean(true) => Ok(Passthrough::On),
                DeValue::Boolean(false) => Ok(Passthrough::Off),
                _ => Err(Expected(WORDS.into())),
            };
            section.read(key, parse)
        },
        show: |passthrough| {
            Some(match passthrough {
                Passthrough::Networks(networks) => networks.iter().map(written).collect(),
                given => (*given == Passthrough::On).into(),
            })
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_admits_only_remote_addresses() {
        for ip in ["10.0.0.1", "192.168.1.1", "100.64.0.1", "8.8.8.8", "fd00::1", "2001:db8::1"] {
            assert!(Passthrough::On.admits(ip.parse().unwrap()), "{ip}");
        }
        // Of 10.0.0.1, and of 10.0.0.127 with prefixes of 48, 56 and 64 bits.
        for ip in [
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "64:ff9b:1:2:3:4:a00:1",
            "64:ff9b:1:a00:0:100::",
            "64:ff9b:1:a:0:1::",
            "64:ff9b:1:0:a:0:100:0",
            "64:ff9b:1:a00:0:7f00::",
            "64:ff9b:1:a:0:7f::",
            "64:ff9b:1:0:a:0:7f00:0",
            "2002:a00:1::",
            "2001:0:1:2::f5ff:fffe",
        ] {
            assert!(Passthrough::On.admits(ip.parse().unwrap()), "{ip}");
        }
        let kept = [
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::169.254.169.254",
            "64:ff9b:1:fffe:a:b:127.0.0.1",
            // 169.254.169.254 and 127.0.0.1 with prefixes of 48, 56 and 64 bits.
            "64:ff9b:1:a9fe:a9:fe00::",
            "64:ff9b:1:a9:fe:a9fe::",
            "64:ff9b:1:0:a9:fea9:fe00:0",
            "64:ff9b:1:7f00:0:100::",
            "64:ff9b:1:7f:0:1::",
            "64:ff9b:1:0:7f:0:100:0",
            "2001:0:102:304:8000:1:5601:5601",
            "2001::80ff:fffe",
            "2002:a9fe:a9fe::1",
            "fd00:ec2::254",
        ];
        for ip in kept {
            assert!(!Passthrough::On.admits(ip.parse().unwrap()), "{ip}");
            assert!(!Passthrough::Off.admits(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn networks_admit_only_their_addresses() {
        let networks = ["127.0.0.0/8", "10.1.0.0/16", "192.0.2.7", "fd00::/8"];
        let networks = Passthrough::Networks(networks.iter().map(|text| Network::parse(text).unwrap()).collect());
        for ip in ["127.0.0.1", "10.1.255.255", "192.0.2.7", "fd12::1", "::ffff:127.0.0.1"] {
            assert!(networks.admits(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["128.0.0.1", "10.2.0.0", "192.0.2.8", "fe00::1", "::1"] {
            assert!(!networks.admits(ip.parse().unwrap()), "{ip}");
        }
        assert!(Network::parse("0.0.0.0/0").unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!(!Network::parse("0.0.0.0/0").unwrap().contains("::1".parse().unwrap()));
        assert!(Network::parse("::/0").unwrap().contains("::1".parse().unwrap()));
    }

    #[test]
    fn malformed_networks_are_rejected() {
        for text in
            ["", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0/", "10.0.0.0/+8", "10.0.0/8", "::/129", "fd00::1/8", "a"]
        {
            assert_eq!(Network::parse(text), None, "{text}");
        }
    }
}
