//! A network interface whose other end is this process (TAP): frames that it sends are read from a file, and frames that are written to
//! the file arrive on it. Each frame follows a header of [`HEADER`] bytes (`struct virtio_net_hdr`), which says whether its checksum is
//! partial and how it is segmented.

#![allow(unsafe_code)] // a TAP interface is made by ioctl

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
};

pub(crate) const HEADER: usize = 10;

/// IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (linux/if_tun.h).
const FLAGS: i16 = 0x5002;
/// TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN.
const OFFLOADS: u32 = 15;

/// The part of `struct ifreq` that is used, padded to its size.
#[repr(C)]
struct TapRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()), TapRequest);
nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>()));

/// Makes an interface in this thread's network namespace; it exists until the file is closed. Reads do not block. With `offloads`, the
/// kernel passes partial checksums and unsegmented packets of up to 64 KiB; without, it passes packets as they are on a wire.
pub(crate) fn open(name: &str, offloads: bool) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let mut request = TapRequest { name: [0; 16], flags: FLAGS, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads a `struct ifreq` of this size.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }?;
    // SAFETY: the argument is a number.
    unsafe { set_offload(file.as_raw_fd(), if offloads { OFFLOADS as libc::c_int } else { 0 }) }?;
    Ok(file)
}
