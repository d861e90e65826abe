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
        for (name, far, number) in [(TO_CLIENT, &net.client, 1), (TO_ENDPOINT, &net.endpoint, 2)] {
            let path = format!("/proc/{}/fd/{}", std::process::id(), far.0.as_raw_fd());
            net.agent.ip(&format!("link add {name} type veth peer name {name} netns {path}"));
            for (place, host) in [(&net.agent, 1), (far, 2)] {
                place.ip(&format!("addr add 10.{number}.0.{host}/24 dev {name}"));
                place.ip(&format!("addr add fd00:{number}::{host}/64 dev {name} nodad"));
                place.ip(&format!("link set {name} up"));
            }
        }
        net
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
