//! For tests: a network interface whose other end is this process, in its own network namespace.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    process::Command,
};

use nix::sched::{CloneFlags, unshare};

/// IFF_TUN | IFF_NO_PI (linux/if_tun.h).
const FLAGS: i16 = 0x1001;

#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(
    tun_set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    InterfaceRequest
);

/// Moves this thread into a new network namespace with one interface, `tun0` at 10.9.9.1/24, and loopback up. Bytes
/// written to the file arrive at the interface; packets to 10.9.9.0/24 are read from it. Needs root.
pub fn isolated() -> io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"tun0");
    let request = InterfaceRequest { name, flags: FLAGS, rest: [0; 22] };
    // SAFETY: the kernel reads a struct ifreq; this is the part it uses, padded to the full size.
    unsafe { tun_set_interface(file.as_raw_fd(), &raw const request) }?;
    for command in ["link set lo up", "addr add 10.9.9.1/24 dev tun0", "link set tun0 up"] {
        // A child inherits the network namespace of the thread that starts it.
        let status = Command::new("ip").args(command.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("ip {command}: {status}")));
        }
    }
    Ok(file)
}
