//! What the programs of path `wire` assume about interfaces of this thread's network namespace.

use std::{io, os::fd::AsRawFd as _};

use nix::{
    net::if_::{if_indextoname, if_nameindex},
    sys::socket::{AddressFamily, SockFlag, SockType},
};

/// `ARPHRD_ETHER`: packets begin with an Ethernet header of 14 bytes.
const ETHERNET: libc::sa_family_t = libc::ARPHRD_ETHER;

nix::ioctl_read_bad!(get_hardware_address, libc::SIOCGIFHWADDR, libc::ifreq);

/// The names of all interfaces with Ethernet's header.
pub fn all() -> io::Result<Vec<String>> {
    let interfaces = if_nameindex()?;
    let names = interfaces.iter().filter_map(|interface| interface.name().to_str().ok());
    Ok(names.filter(|name| is_ethernet(name).unwrap_or(false)).map(str::to_owned).collect())
}

/// Whether an interface has Ethernet's header.
pub(super) fn is_ethernet(name: &str) -> io::Result<bool> {
    Ok(link(name)?.sa_family == ETHERNET)
}

/// The interface's own hardware address.
pub(super) fn hardware_address(interface: u32) -> io::Result<[u8; 6]> {
    let name = if_indextoname(interface)?;
    let link = link(name.to_str().map_err(|_| io::ErrorKind::InvalidData)?)?;
    let mut address = [0; 6];
    for (to, from) in address.iter_mut().zip(link.sa_data) {
        // c_char is signed on x86_64 only.
        [*to] = from.to_ne_bytes();
    }
    Ok(address)
}

fn link(name: &str) -> io::Result<libc::sockaddr> {
    let mut request = named(name)?;
    let any = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the kernel reads and writes the ifreq.
    unsafe { get_hardware_address(any.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the call has written this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr })
}

/// A request about an interface.
pub(super) fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq consists of integers and pointers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}
