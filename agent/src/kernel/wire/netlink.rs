//! Requests to rtnetlink(7), in this thread's network namespace.

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd},
};

/// The length of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;

/// A request that is acknowledged.
pub(super) struct NetlinkRequest {
    bytes: Vec<u8>,
}

impl NetlinkRequest {
    /// `body` is what follows the header, such as `struct ifinfomsg`. NLM_F_REQUEST and NLM_F_ACK are added to `flags`.
    pub(super) fn new(kind: u16, flags: libc::c_int, body: &[u8]) -> Self {
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        // The sequence number, and the kernel's choice of an address.
        bytes.extend_from_slice(&1u32.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(body);
        Self { bytes }
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.begin(kind, value.len());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// An attribute that consists of `body` and of what `inside` adds.
    pub(super) fn nested(mut self, kind: u16, body: &[u8], inside: impl FnOnce(Self) -> Self) -> Self {
        let at = self.bytes.len();
        self.begin(kind, 0);
        self.bytes.extend_from_slice(body);
        let mut whole = inside(self);
        let len = (whole.bytes.len() - at) as u16;
        whole.bytes[at..at + 2].copy_from_slice(&len.to_ne_bytes());
        whole
    }

    fn begin(&mut self, kind: u16, len: usize) {
        self.bytes.extend_from_slice(&(4 + len as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
    }

    /// Sends the request, and passes each message of the answer, from its header on, to `take`.
    pub(super) fn exchange(mut self, take: impl FnMut(&[u8])) -> io::Result<()> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        exchange(&self.bytes, take)
    }
}

/// Sends a message, and passes each message of the answer, from its header on, to `take`. Ends with the last part of a dump, or with an
/// error or an acknowledgement.
pub(super) fn exchange(message: &[u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = open()?;
    nix::unistd::write(&socket, message)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = nix::unistd::read(&socket, &mut buffer)?;
        let mut rest = &buffer[..n];
        while rest.len() >= HEADER {
            let len = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let kind = i32::from(u16::from_ne_bytes([rest[4], rest[5]]));
            let Some(one) = rest.get(..len.max(HEADER)) else { return Err(io::ErrorKind::InvalidData.into()) };
            match kind {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => return result(one),
                _ => take(one),
            }
            rest = rest.get(len.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The value of the first attribute of this type.
pub(super) fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let (len, kind) = (rest.get(..2)?, rest.get(2..4)?);
        let len = usize::from(u16::from_ne_bytes([len[0], len[1]]));
        // The highest bits are flags.
        if u16::from_ne_bytes([kind[0], kind[1]]) & 0x3fff == wanted {
            return rest.get(4..len);
        }
        rest = rest.get(len.max(4).next_multiple_of(4)..)?;
    }
}

/// The error of an answer; 0 is success.
fn result(message: &[u8]) -> io::Result<()> {
    let error = message.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-error)) }
}

pub(super) fn open() -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
