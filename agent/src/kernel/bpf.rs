//! bpf(2) for what aya does not offer.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

pub(super) const MAP_CREATE: libc::c_int = 0;
pub(super) const MAP_UPDATE_ELEM: libc::c_int = 2;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_DETACH: libc::c_int = 34;

/// `attributes` is the beginning of `union bpf_attr` for this command.
pub(super) fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the attributes and the words that they point to, which outlive
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

/// The beginning of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct Get {
    path: u64,
    fd: u32,
    flags: u32,
}

/// That for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`, for a link of TCX.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    interface: u32,
    place: u32,
}

/// Opens a pinned object.
fn get(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &Get { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the call has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Detaches a pinned link at once. The removal of its last pin would do so later, in the background.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let link = get(pin)?;
    // The attribute is one descriptor.
    bpf(LINK_DETACH, &(link.as_raw_fd() as u32)).map(drop)
}

/// The interface of a pinned link of TCX; 0 if the interface is gone.
pub(super) fn interface_of_link(pin: &Path) -> io::Result<u32> {
    let link = get(pin)?;
    let mut info = LinkInfo::default();
    let len = size_of::<LinkInfo>() as u32;
    bpf(OBJ_GET_INFO_BY_FD, &GetInfo { fd: link.as_raw_fd() as u32, len, info: (&raw mut info) as u64 })?;
    Ok(info.interface)
}
