//! Filters of the clsact qdisc, for kernels without TCX: which of them are a given program, and their removal (rtnetlink(7)).

use std::io;

use super::netlink::{self, attribute};

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

fn acknowledged(message: NetlinkMessage, attributes: &[u8]) -> io::Result<()> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    exchange(NetlinkMessage { flags, ..message }, attributes, |_, _| {})
}

/// Sends a request, and passes each message of the answer with its attributes to `take`. An interface or a qdisc that is gone has no
/// filters.
fn exchange(message: NetlinkMessage, attributes: &[u8], mut take: impl FnMut(NetlinkMessage, &[u8])) -> io::Result<()> {
    let message = NetlinkMessage { len: (LEN + attributes.len()) as u32, seq: 1, ..message };
    // SAFETY: a struct of integers without padding.
    let bytes: [u8; LEN] = unsafe { std::mem::transmute(message) };
    let answered = netlink::exchange(&[&bytes[..], attributes].concat(), |one| {
        if let Some(head) = one.first_chunk::<LEN>() {
            // SAFETY: every value of its bytes is valid.
            take(unsafe { std::mem::transmute::<[u8; LEN], NetlinkMessage>(*head) }, &one[LEN..]);
        }
    });
    answered.or_else(|error| match error.raw_os_error() {
        Some(libc::ENODEV | libc::ENOENT) => Ok(()),
        _ => Err(error),
    })
}
