//! What the programs of path `wire` assume about an interface.

use std::{io, os::fd::AsRawFd as _};

use nix::sys::socket::{AddressFamily, SockFlag, SockType};

/// `ARPHRD_ETHER`: packets begin with an Ethernet header of 14 bytes.
const ETHERNET: libc::sa_family_t = libc::ARPHRD_ETHER;

nix::ioctl_read_bad!(hardware_address, libc::SIOCGIFHWADDR, libc::ifreq);

/// Whether an interface of this thread's network namespace has Ethernet's header.
pub(super) fn is_ethernet(name: &str) -> io::Result<bool> {
    let mut request = named(name)?;
    let any = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: the kernel reads and writes the ifreq.
    unsafe { hardware_address(any.as_raw_fd(), &raw mut request) }?;
    // SAFETY: the call has written this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family } == ETHERNET)
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
