//! Three network namespaces of the self-test's own, joined by veth pairs: a client, an agent and an endpoint. Needs CAP_SYS_ADMIN and
//! CAP_NET_ADMIN. Everything is gone when this is dropped and no socket is left.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns, unshare},
};

use super::netlink::NetlinkRequest;

/// The agent's interfaces; their peers have the same names.
const TO_CLIENT: &str = "client0";
const TO_ENDPOINT: &str = "endpoint0";

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Without duplicate address detection.
const IFA_F_NODAD: u8 = 2;

/// The three namespaces.
pub struct TrialNet {
    /// The client's namespace.
    pub client: TrialNamespace,
    /// The namespace between the two others.
    pub agent: TrialNamespace,
    /// The endpoint's namespace.
    pub endpoint: TrialNamespace,
    /// Whether the interfaces have IPv6 addresses.
    pub has_ipv6: bool,
}

/// A network namespace.
pub struct TrialNamespace(File);

impl TrialNet {
    /// The agent's interfaces.
    pub const INTERFACES: [&'static str; 2] = [TO_CLIENT, TO_ENDPOINT];

    /// Makes the namespaces and joins them.
    pub fn new() -> io::Result<Self> {
        let mut net = Self {
            client: TrialNamespace::new()?,
            agent: TrialNamespace::new()?,
            endpoint: TrialNamespace::new()?,
            has_ipv6: true,
        };
        for (name, far, link) in [(TO_CLIENT, &net.client, 1), (TO_ENDPOINT, &net.endpoint, 2)] {
            net.agent.run(|| veth(name, far.0.as_fd()))??;
            for (place, host) in [(&net.agent, 1), (far, 2)] {
                place.run(|| -> io::Result<()> {
                    let index = if_nametoindex(name)?;
                    add_address(index, address(false, link, host))?;
                    bring_up(index)
                })??;
                // IPv6 may be off on this machine.
                let added = place.run(|| add_address(if_nametoindex(name)?, address(true, link, host)))?;
                net.has_ipv6 &= added.is_ok();
            }
        }
        Ok(net)
    }

    /// Where the agent listens.
    pub fn agent_address(ipv6: bool) -> SocketAddr {
        SocketAddr::new(address(ipv6, 1, 1), 0)
    }

    /// Where the endpoint listens.
    pub fn endpoint_address(ipv6: bool) -> SocketAddr {
        SocketAddr::new(address(ipv6, 2, 2), 0)
    }
}

impl TrialNamespace {
    fn new() -> io::Result<Self> {
        let make = || -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        on_thread(make)?.map(Self)
    }

    /// Runs on a thread in the namespace. Sockets and threads that it creates stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Benchmark addresses (RFC 2544) and documentation addresses (RFC 3849): nothing else is in these namespaces.
fn address(ipv6: bool, link: u8, host: u8) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0x2001, 0xdb8, 0, link.into(), 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(198, 18, link, host).into()
    }
}

/// A name as C writes it.
fn c_string(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// `struct ifinfomsg`: no interface, or the flags of one.
fn link(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

/// Makes a pair of interfaces of the same name: one in this thread's namespace, and one in `far`.
fn veth(name: &str, far: BorrowedFd<'_>) -> io::Result<()> {
    let (name, far) = (c_string(name), far.as_raw_fd().to_ne_bytes());
    NetlinkRequest::new(RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &link(0, 0))
        .attribute(IFLA_IFNAME, &name)
        .nested(IFLA_LINKINFO, &[], |info| {
            info.attribute(IFLA_INFO_KIND, b"veth").nested(IFLA_INFO_DATA, &[], |data| {
                data.nested(VETH_INFO_PEER, &link(0, 0), |peer| {
                    peer.attribute(IFLA_IFNAME, &name).attribute(IFLA_NET_NS_FD, &far)
                })
            })
        })
        .exchange(|_| {})
}

fn bring_up(index: u32) -> io::Result<()> {
    NetlinkRequest::new(RTM_NEWLINK, 0, &link(index, libc::IFF_UP as u32)).exchange(|_| {})
}

fn add_address(index: u32, address: IpAddr) -> io::Result<()> {
    let (family, prefix, flags, octets) = match address {
        IpAddr::V4(address) => (libc::AF_INET, 24, 0, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, 64, IFA_F_NODAD, address.octets().to_vec()),
    };
    // `struct ifaddrmsg`.
    let body = [[family as u8, prefix, flags, 0], index.to_ne_bytes()].concat();
    NetlinkRequest::new(RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
        .attribute(IFA_LOCAL, &octets)
        .attribute(IFA_ADDRESS, &octets)
        .exchange(|_| {})
}
