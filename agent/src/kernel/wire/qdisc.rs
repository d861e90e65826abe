//! Filters of the clsact qdisc, for kernels without TCX: which of them are a given program, and their removal (rtnetlink(7)).

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd},
};

/// `struct nlmsghdr`, then `struct tcmsg`.
#[repr(C)]
#[derive(Clone, Copy)]
struct NetlinkMessage {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    pid: u32,
    family: u32,
    interface: i32,
    handle: u32,
    parent: u32,
    info: u32,
}

const HEADER: usize = 16;
const LEN: usize = size_of::<NetlinkMessage>();
const RTM_DELQDISC: u16 = 37;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const CLSACT: u32 = 0xffff_fff1;
/// TC_H_MIN_INGRESS and TC_H_MIN_EGRESS of the clsact qdisc.
const PARENTS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_ID: u16 = 11;

/// A filter, and the id of the program that it runs; 0: it runs none.
struct Filter {
    message: NetlinkMessage,
    program: u32,
    is_bpf: bool,
}

/// Removes the filters of an interface that run this program.
pub(super) fn remove_program(interface: u32, program: u32) -> io::Result<()> {
    for filter in filters(interface)? {
        if filter.program == program && filter.is_bpf {
            acknowledged(NetlinkMessage { kind: RTM_DELTFILTER, ..filter.message }, &kind(b"bpf\0"))?;
        }
    }
    Ok(())
}

/// Removes the clsact qdisc of an interface if it has no filters. Whether it is gone.
pub(super) fn remove_if_empty(interface: u32) -> io::Result<bool> {
    if !filters(interface)?.is_empty() {
        return Ok(false);
    }
    let message = NetlinkMessage { kind: RTM_DELQDISC, parent: CLSACT, handle: 0xffff_0000, ..request(interface) };
    acknowledged(message, &[]).map(|()| true)
}

fn request(interface: u32) -> NetlinkMessage {
    NetlinkMessage {
        len: 0,
        kind: 0,
        flags: 0,
        seq: 1,
        pid: 0,
        family: 0,
        interface: interface as i32,
        handle: 0,
        parent: 0,
        info: 0,
    }
}

/// The attribute TCA_KIND.
fn kind(name: &[u8; 4]) -> [u8; 8] {
    let mut attribute = [0; 8];
    attribute[..2].copy_from_slice(&8u16.to_ne_bytes());
    attribute[2..4].copy_from_slice(&TCA_KIND.to_ne_bytes());
    attribute[4..].copy_from_slice(name);
    attribute
}

fn filters(interface: u32) -> io::Result<Vec<Filter>> {
    let mut found = Vec::new();
    for parent in PARENTS {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        exchange(
            NetlinkMessage { kind: RTM_GETTFILTER, flags, parent, ..request(interface) },
            &[],
            |message, rest| {
                // The first message about a priority describes the classifier, not a filter.
                if message.handle != 0 {
                    let program = attribute(rest, TCA_OPTIONS).and_then(|options| attribute(options, TCA_BPF_ID));
                    let program = program.and_then(|id| id.get(..4)?.try_into().ok()).map_or(0, u32::from_ne_bytes);
                    let is_bpf = attribute(rest, TCA_KIND) == Some(b"bpf\0");
                    found.push(Filter { message, program, is_bpf });
                }
            },
        )?;
    }
    Ok(found)
}

/// The value of the first attribute of this type.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
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

fn acknowledged(message: NetlinkMessage, attributes: &[u8]) -> io::Result<()> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    exchange(NetlinkMessage { flags, ..message }, attributes, |_, _| {})
}

/// Sends a request, and passes each message of the answer with its attributes to `take`.
fn exchange(message: NetlinkMessage, attributes: &[u8], mut take: impl FnMut(NetlinkMessage, &[u8])) -> io::Result<()> {
    let socket = open()?;
    let message = NetlinkMessage { len: (LEN + attributes.len()) as u32, seq: 1, ..message };
    // SAFETY: a struct of integers without padding.
    let bytes: [u8; LEN] = unsafe { std::mem::transmute(message) };
    nix::unistd::write(&socket, &[&bytes[..], attributes].concat())?;
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
                _ => {}
            }
            if let Some(head) = one.first_chunk::<LEN>() {
                // SAFETY: every value of its bytes is valid.
                take(unsafe { std::mem::transmute::<[u8; LEN], NetlinkMessage>(*head) }, &one[LEN..]);
            }
            rest = rest.get(len.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The error of an answer; 0 is success. An interface or a qdisc that is gone has no filters.
fn result(message: &[u8]) -> io::Result<()> {
    let error = message.get(HEADER..HEADER + 4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    match -error {
        0 | libc::ENODEV | libc::ENOENT => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
