//! Three network namespaces in a row: client, agent, endpoint. Needs root and `ip`.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    process::Command,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType},
};

use super::super::interface::named;

/// The agent's interfaces; their peers have the same names.
pub(super) const TO_CLIENT: &str = "c0";
pub(super) const TO_ENDPOINT: &str = "e0";

pub(super) struct Net {
    pub(super) client: Place,
    pub(super) agent: Place,
    pub(super) endpoint: Place,
}

/// A namespace, which exists until this is dropped and no socket or thread is left in it.
pub(super) struct Place(File);

/// The version of IP, and with it the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Four,
    Six,
}

impl Family {
    pub(super) fn agent(self, port: u16) -> SocketAddr {
        self.at("10.1.0.1", "fd00:1::1", port)
    }

    pub(super) fn endpoint(self, port: u16) -> SocketAddr {
        self.at("10.2.0.2", "fd00:2::2", port)
    }

    pub(super) fn client(self, port: u16) -> SocketAddr {
        self.at("10.1.0.2", "fd00:1::2", port)
    }

    fn at(self, four: &str, six: &str, port: u16) -> SocketAddr {
        let address: IpAddr = if self == Self::Four { four } else { six }.parse().expect("an address");
        SocketAddr::new(address, port)
    }
}

impl Net {
    pub(super) fn new() -> Self {
        let net = Self { client: Place::new(), agent: Place::new(), endpoint: Place::new() };
        net.join(TO_CLIENT, &net.client, 1);
        net.join(TO_ENDPOINT, &net.endpoint, 2);
        net
    }

    /// Joins the agent with another namespace, by interfaces of this name and the network with this number.
    pub(super) fn join(&self, name: &str, far: &Place, number: u8) {
        self.agent.ip(&format!("link add {name} type veth peer name {name} netns {}", far.path()));
        self.agent.address(name, number, "1");
        far.address(name, number, "2");
    }

    /// Puts a router between the client and the agent, whose link to the client takes packets of 1400 bytes at most. The client does not
    /// know that. The router exists until it is dropped.
    pub(super) fn narrow(&self) -> Place {
        let router = Place::new();
        router.run(|| {
            for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{forwarding}"), "1").expect("root");
            }
        });
        self.agent.ip(&format!("link del {TO_CLIENT}"));
        self.agent.ip(&format!("link add {TO_CLIENT} type veth peer name agent0 netns {}", router.path()));
        router.ip(&format!("link add client0 type veth peer name {TO_CLIENT} netns {}", self.client.path()));
        self.agent.address(TO_CLIENT, 1, "1");
        router.address("agent0", 1, "fe");
        router.address("client0", 4, "fe");
        self.client.address(TO_CLIENT, 4, "2");
        router.ip("link set client0 mtu 1400");
        for (place, net, via) in [(&self.agent, 4, 1), (&self.client, 1, 4)] {
            place.ip(&format!("route add 10.{net}.0.0/24 via 10.{via}.0.254"));
            place.ip(&format!("-6 route add fd00:{net}::/64 via fd00:{via}::fe"));
        }
        router
    }

    /// Switches checksum and segmentation offloads of all interfaces off.
    pub(super) fn without_offloads(&self) {
        for (place, names) in [
            (&self.client, &[TO_CLIENT][..]),
            (&self.agent, &[TO_CLIENT, TO_ENDPOINT]),
            (&self.endpoint, &[TO_ENDPOINT]),
        ] {
            place.run(|| names.iter().for_each(|name| switch_off(name).expect("ethtool")));
        }
    }
}

impl Place {
    fn new() -> Self {
        let make = || -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        };
        let place = Self(std::thread::spawn(make).join().expect("no panic").expect("root"));
        place.ip("link set lo up");
        place
    }

    /// Where other processes find it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Gives an interface its addresses in the network with this number; `host` is hexadecimal.
    fn address(&self, name: &str, number: u8, host: &str) {
        let four = u8::from_str_radix(host, 16).expect("a number");
        self.ip(&format!("addr add 10.{number}.0.{four}/24 dev {name}"));
        self.ip(&format!("addr add fd00:{number}::{host}/64 dev {name} nodad"));
        self.ip(&format!("link set {name} up"));
    }

    /// Runs on a thread in the namespace. Sockets that it creates stay there.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).expect("root");
                work()
            });
            thread.join().expect("no panic")
        })
    }

    pub(super) fn ip(&self, command: &str) {
        // A child inherits the namespace of the thread that starts it.
        let output = self.run(|| Command::new("ip").args(command.split(' ')).output()).expect("ip");
        assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// `struct ethtool_value` of linux/ethtool.h.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

nix::ioctl_write_ptr_bad!(ethtool, 0x8946, libc::ifreq);

/// ETHTOOL_STSO, SGSO, SGRO, SSG, STXCSUM and SRXCSUM.
const SWITCHES: [u32; 6] = [0x1f, 0x24, 0x2c, 0x19, 0x17, 0x15];

fn switch_off(name: &str) -> io::Result<()> {
    let any = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None)?;
    for command in SWITCHES {
        let mut value = EthtoolValue { command, data: 0 };
        let mut request = named(name)?;
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request points to the value, which outlives the call.
        unsafe { ethtool(any.as_raw_fd(), &raw const request) }?;
    }
    Ok(())
}
