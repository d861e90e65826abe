//! The network namespace of this thread.

use std::{io, os::fd::AsRawFd as _, path::Path};

use nix::sys::socket::{AddressFamily, SockFlag, SockType};

/// asm-generic/socket.h, since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Unique among all network namespaces until reboot.
pub(super) fn cookie() -> io::Result<u64> {
    let any = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let (mut value, mut len) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: pointers to locals of the given sizes.
    let result = unsafe {
        libc::getsockopt(any.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut value).cast(), &raw mut len)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Whether it is the namespace that the machine started with, which outlives every process. Only there the kernel shows the settings
/// of the network that hold for the whole machine.
pub fn is_initial() -> bool {
    Path::new("/proc/sys/net/core/dev_weight").exists()
}
