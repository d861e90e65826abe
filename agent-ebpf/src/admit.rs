//! `xdp`, never attached: the agent runs it (`BPF_PROG_TEST_RUN`) to insert an endpoint's own socket into the message program's map
//! before a response, and to remove it afterwards.
//!
//! On some kernels `ioctl(FIONREAD)` on a socket in a map returns 0 while data waits. So the socket enters only after the endpoint
//! has read everything that the agent wrote, and leaves before the agent writes again. Programs of this type may look sockets up by
//! address, also in other network namespaces, and insert them into maps.

use core::{ffi::c_void, mem::offset_of, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_NOEXIST, bpf_sock_tuple, xdp_action::XDP_ABORTED},
    helpers::generated::{
        bpf_loop, bpf_map_delete_elem, bpf_map_lookup_elem, bpf_map_update_elem, bpf_sk_lookup_tcp, bpf_sk_release,
        bpf_skc_to_tcp_sock,
    },
    macros::xdp,
    programs::XdpContext,
};
use penstock_common::slot::{Admission, admission};

use crate::{
    maps::{Ends, INDEX, LOCAL_SLOTS, LOCALS, NAMESPACES, NEIGHBOURS, Neighbour, OFFSETS, SOURCES},
    memory::{keeps_account, may_block, read_u32, read_u64, stamps_what_it_sends, zero},
};

/// The network namespace of the process that runs the program (BPF_F_CURRENT_NETNS).
const OWN: i64 = -1;
const NONE: i64 = -2;
/// How many namespace ids are tried. The kernel assigns them from 0 upwards.
const MAX_IDS: u32 = 4096;

#[xdp]
fn penstock_admit(ctx: XdpContext) -> u32 {
    let data = ctx.data();
    if data + size_of::<Admission>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    let request = data as *const Admission;
    // SAFETY: the request lies inside the packet, as just checked.
    let (connection, leave, blocking) = unsafe {
        (
            (&raw const (*request).connection).read_unaligned(),
            (&raw const (*request).leave).read_unaligned(),
            (&raw const (*request).blocking).read_unaligned(),
        )
    };
    // SAFETY: the agent removes the entry only after it has closed the connection.
    let Some(index) = (unsafe { INDEX.get(&connection) }) else { return admission::UNKNOWN };
    let index = *index;
    let (Some(slot), Some(neighbour)) = (LOCAL_SLOTS.get_ptr_mut(index), NEIGHBOURS.get_ptr_mut(index)) else {
        return admission::UNKNOWN;
    };
    // SAFETY: reads one word of a map's value.
    let cookie = unsafe { (*slot).peer.get() };
    if cookie == 0 {
        return admission::UNKNOWN;
    }
    let locals = (&raw const LOCALS).cast_mut().cast::<c_void>();
    if leave != 0 {
        // SAFETY: the key has the map's key type.
        unsafe { bpf_map_delete_elem(locals, (&raw const cookie).cast()) };
    }
    // SAFETY: `neighbour` is a map's value, which was written before the slot named the socket.
    let socket = unsafe { find(ctx.as_ptr(), neighbour, cookie) };
    let Ok(socket) = socket else {
        // A closed socket is in no map.
        return if leave != 0 { admission::DONE } else { admission::ELSEWHERE };
    };
    let outcome = if leave != 0 {
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        match unsafe { word(socket, OFFSETS.load().sk_user_data) } {
            0 => admission::DONE,
            _ => admission::IN_USE,
        }
    } else {
        // SAFETY: `socket` is the socket that `find` returned with a reference.
        match unsafe { refusal(connection, socket, blocking != 0) } {
            admission::DONE => {
                // SAFETY: the key has the map's key type, and `find` took a reference to the socket.
                let entered = unsafe {
                    bpf_map_update_elem(locals, (&raw const cookie).cast(), socket.cast(), u64::from(BPF_NOEXIST))
                };
                if entered == 0 { admission::DONE } else { admission::REFUSED }
            }
            why => why,
        }
    };
    // SAFETY: releases the reference that `find` took.
    unsafe { bpf_sk_release(socket.cast()) };
    outcome
}

/// Why the endpoint's socket must not enter the map now; `DONE` if it may.
#[inline(always)]
unsafe fn refusal(connection: u64, socket: *mut c_void, blocking: bool) -> u32 {
    let offsets = OFFSETS.load();
    // SAFETY: the caller passes a socket that it holds.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket) }.cast_const().cast::<u8>();
    if tcp.is_null() {
        return admission::UNKNOWN;
    }
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    if unsafe { keeps_account(tcp) || stamps_what_it_sends(tcp) } {
        return admission::ACCOUNT;
    }
    // SAFETY: as before.
    if !blocking && unsafe { may_block(tcp) } {
        return admission::BLOCKING;
    }
    let sources = (&raw const SOURCES).cast_mut().cast::<c_void>();
    // SAFETY: the lookup takes a reference, which is released below.
    let own = unsafe { bpf_map_lookup_elem(sources, (&raw const connection).cast()) };
    if own.is_null() {
        return admission::UNKNOWN;
    }
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let (written, read) = unsafe { (word(own, offsets.write_seq) as u32, read_u32(tcp, offsets.copied_seq)) };
    // SAFETY: releases the reference of the lookup.
    unsafe { bpf_sk_release(own) };
    if written == read { admission::DONE } else { admission::UNREAD }
}

/// Finds the endpoint's socket. The caller releases its reference.
#[inline(always)]
unsafe fn find(ctx: *mut c_void, neighbour: *mut Neighbour, cookie: u64) -> Result<*mut c_void, ()> {
    // SAFETY: the caller passes a map's value.
    let (ends, namespace, searched) = unsafe { ((*neighbour).ends, (*neighbour).namespace, (*neighbour).searched) };
    // SAFETY: the value is copied at once.
    let id = unsafe { NAMESPACES.get(&namespace) }.map_or(OWN, |id| *id);
    // SAFETY: `ctx` is the program's context.
    let socket = unsafe { look_up(ctx, &ends, id) };
    if !socket.is_null() {
        // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
        if unsafe { word(socket, OFFSETS.load().skc_cookie) } == cookie {
            return Ok(socket);
        }
        // SAFETY: releases the reference of the lookup.
        unsafe { bpf_sk_release(socket) };
    }
    if searched != 0 {
        return Err(());
    }
    // SAFETY: writes one word of a map's value.
    unsafe { (*neighbour).searched = 1 };
    let mut search = Search { ctx, ends, cookie, id: NONE ^ zero(ends.agent.port) as i64 };
    let search_ptr: *mut Search = &raw mut search;
    // SAFETY: `try_id` has the signature that `bpf_loop` calls, and `search` outlives the call.
    unsafe { bpf_loop(MAX_IDS, try_id as *mut c_void, search_ptr.cast(), 0) };
    let id = search.id;
    if id < OWN {
        return Err(());
    }
    let _ = NAMESPACES.insert(&namespace, &id, 0);
    // SAFETY: `ctx` is the program's context.
    let socket = unsafe { look_up(ctx, &ends, id) };
    if socket.is_null() { Err(()) } else { Ok(socket) }
}

/// One word of a TCP socket; 0 if it is not a full socket.
#[inline(always)]
unsafe fn word(socket: *mut c_void, offset: u32) -> u64 {
    // The verifier permits offsets from the pointer that this helper returns.
    // SAFETY: the caller passes a socket that it holds.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket) };
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    if tcp.is_null() { 0 } else { unsafe { read_u64(tcp.cast_const().cast(), offset) } }
}

struct Search {
    ctx: *mut c_void,
    ends: Ends,
    cookie: u64,
    /// The namespace id that was found, or `NONE`.
    id: i64,
}

/// Tries one namespace id; the first one is the agent's own namespace. Returns 0 to continue, 1 to stop.
extern "C" fn try_id(number: u64, search: *mut Search) -> u64 {
    // SAFETY: `bpf_loop` passes the pointer that it was given.
    let search = unsafe { &mut *search };
    let id = number as i64 + OWN;
    // SAFETY: the kernel passed this context.
    let socket = unsafe { look_up(search.ctx, &search.ends, id) };
    if socket.is_null() {
        return 0;
    }
    // SAFETY: `bpf_probe_read_kernel` tolerates bad addresses.
    let found = unsafe { word(socket, OFFSETS.load().skc_cookie) };
    // SAFETY: releases the reference of the lookup.
    unsafe { bpf_sk_release(socket) };
    if found != search.cookie {
        return 0;
    }
    search.id = id ^ zero(search.ends.agent.port) as i64;
    1
}

/// The established socket at the endpoint's end in the namespace with this id; null if it does not exist.
#[inline(always)]
unsafe fn look_up(ctx: *mut c_void, ends: &Ends, id: i64) -> *mut c_void {
    let Ends { agent, endpoint } = *ends;
    // As in a packet from the agent to the endpoint. A tuple has the addresses, then the ports, in network order.
    let ports = u32::from((agent.port as u16).to_be()) | u32::from((endpoint.port as u16).to_be()) << 16;
    let is_mapped = agent.address[0] == 0 && agent.address[1] == 0 && agent.address[2] == 0xffff_u32.to_be();
    if is_mapped {
        let mut tuple = [agent.address[3], endpoint.address[3], ports];
        let tuple_ptr = ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        // SAFETY: the pointer is to an IPv4 tuple of this size.
        unsafe { bpf_sk_lookup_tcp(ctx, tuple_ptr, size_of_val(&tuple) as u32, id as u64, 0).cast() }
    } else {
        let mut tuple = Tuple6 { agent: agent.address, endpoint: endpoint.address, ports };
        let tuple_ptr = ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        // SAFETY: the pointer is to an IPv6 tuple of this size.
        unsafe { bpf_sk_lookup_tcp(ctx, tuple_ptr, size_of::<Tuple6>() as u32, id as u64, 0).cast() }
    }
}

#[repr(C)]
struct Tuple6 {
    agent: [u32; 4],
    endpoint: [u32; 4],
    ports: u32,
}

const _: () = assert!(size_of::<Tuple6>() == 36 && offset_of!(Tuple6, ports) == 32);
