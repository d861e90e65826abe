//! `xdp`, never attached: the agent runs it by hand to put an endpoint's own socket into the message program's map for the
//! length of a response, and to take it out again.
//!
//! In the map a socket is another one to its owner: on some kernels `ioctl(FIONREAD)` says 0 while data waits. So it enters only when
//! the endpoint has read all that the agent has written, when that 0 is the truth, and leaves before the agent writes again. Programs
//! of this type may look sockets up by their addresses, also in other network namespaces, and put them into maps.

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
    memory::{keeps_account, read_u32, read_u64, stamps_what_it_sends, zero},
};

/// The namespace of whoever runs the program (BPF_F_CURRENT_NETNS).
const OWN: i64 = -1;
const NONE: i64 = -2;
/// Ids of namespaces that are tried. The kernel gives them out from 0 up.
const MAX_IDS: u32 = 4096;

#[xdp]
fn penstock_admit(ctx: XdpContext) -> u32 {
    let data = ctx.data();
    if data + size_of::<Admission>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    let request = data as *const Admission;
    // SAFETY: inside the packet, as has just been compared.
    let (connection, leave) = unsafe {
        ((&raw const (*request).connection).read_unaligned(), (&raw const (*request).leave).read_unaligned())
    };
    // SAFETY: the entry stays while the agent has the connection.
    let Some(index) = (unsafe { INDEX.get(&connection) }) else { return admission::UNKNOWN };
    let index = *index;
    let (Some(slot), Some(neighbour)) = (LOCAL_SLOTS.get_ptr_mut(index), NEIGHBOURS.get_ptr_mut(index)) else {
        return admission::UNKNOWN;
    };
    // SAFETY: one word of a map's value.
    let cookie = unsafe { (*slot).peer.get() };
    if cookie == 0 {
        return admission::UNKNOWN;
    }
    let locals = (&raw const LOCALS).cast_mut().cast::<c_void>();
    if leave != 0 {
        // SAFETY: a map and a key of its type.
        unsafe { bpf_map_delete_elem(locals, (&raw const cookie).cast()) };
    }
    // SAFETY: a map's value, written before the slot named the socket.
    let socket = unsafe { find(ctx.as_ptr(), neighbour, cookie) };
    let Ok(socket) = socket else {
        // One that is gone is in no map.
        return if leave != 0 { admission::DONE } else { admission::ELSEWHERE };
    };
    let outcome = if leave != 0 {
        // SAFETY: the helper that reads checks every address.
        match unsafe { word(socket, OFFSETS.load().sk_user_data) } {
            0 => admission::DONE,
            _ => admission::IN_USE,
        }
    } else {
        // SAFETY: as above.
        match unsafe { refusal(connection, socket) } {
            admission::DONE => {
                // SAFETY: a map, a key of its type, and a socket that we hold.
                let entered = unsafe {
                    bpf_map_update_elem(locals, (&raw const cookie).cast(), socket.cast(), u64::from(BPF_NOEXIST))
                };
                if entered == 0 { admission::DONE } else { admission::REFUSED }
            }
            why => why,
        }
    };
    // SAFETY: the reference that `find` took.
    unsafe { bpf_sk_release(socket.cast()) };
    outcome
}

/// Why the socket of this connection's endpoint may not enter now.
#[inline(always)]
unsafe fn refusal(connection: u64, socket: *mut c_void) -> u32 {
    let offsets = OFFSETS.load();
    // SAFETY: the caller's.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket) }.cast_const().cast::<u8>();
    if tcp.is_null() {
        return admission::UNKNOWN;
    }
    // SAFETY: the helper that reads checks every address.
    if unsafe { keeps_account(tcp) || stamps_what_it_sends(tcp) } {
        return admission::ACCOUNT;
    }
    let sources = (&raw const SOURCES).cast_mut().cast::<c_void>();
    // SAFETY: a lookup in a socket map takes a reference, which is released below.
    let own = unsafe { bpf_map_lookup_elem(sources, (&raw const connection).cast()) };
    if own.is_null() {
        return admission::UNKNOWN;
    }
    // SAFETY: the helper that reads checks every address.
    let (written, read) = unsafe { (word(own, offsets.write_seq) as u32, read_u32(tcp, offsets.copied_seq)) };
    // SAFETY: the reference of the lookup.
    unsafe { bpf_sk_release(own) };
    if written == read { admission::DONE } else { admission::UNREAD }
}

/// The endpoint's socket, with a reference.
#[inline(always)]
unsafe fn find(ctx: *mut c_void, neighbour: *mut Neighbour, cookie: u64) -> Result<*mut c_void, ()> {
    // SAFETY: the caller's.
    let (ends, namespace, searched) = unsafe { ((*neighbour).ends, (*neighbour).namespace, (*neighbour).searched) };
    // SAFETY: a copy is taken.
    let id = unsafe { NAMESPACES.get(&namespace) }.map_or(OWN, |id| *id);
    // SAFETY: the caller's.
    let socket = unsafe { look_up(ctx, &ends, id) };
    if !socket.is_null() {
        // SAFETY: the helper that reads checks every address.
        if unsafe { word(socket, OFFSETS.load().skc_cookie) } == cookie {
            return Ok(socket);
        }
        // SAFETY: the reference of the lookup.
        unsafe { bpf_sk_release(socket) };
    }
    if searched != 0 {
        return Err(());
    }
    // SAFETY: one word of a map's value.
    unsafe { (*neighbour).searched = 1 };
    let mut search = Search { ctx, ends, cookie, id: NONE ^ zero(ends.agent.port) as i64 };
    let search_ptr: *mut Search = &raw mut search;
    // SAFETY: `try_id` is a function of the signature that bpf_loop calls, and `search` outlives the call.
    unsafe { bpf_loop(MAX_IDS, try_id as *mut c_void, search_ptr.cast(), 0) };
    let id = search.id;
    if id < OWN {
        return Err(());
    }
    let _ = NAMESPACES.insert(&namespace, &id, 0);
    // SAFETY: the caller's.
    let socket = unsafe { look_up(ctx, &ends, id) };
    if socket.is_null() { Err(()) } else { Ok(socket) }
}

/// One word of a TCP socket; 0 where it is no full one.
#[inline(always)]
unsafe fn word(socket: *mut c_void, offset: u32) -> u64 {
    // The verifier lets addresses be computed in what this helper returns.
    // SAFETY: the caller's.
    let tcp = unsafe { bpf_skc_to_tcp_sock(socket) };
    // SAFETY: the helper that reads checks every address.
    if tcp.is_null() { 0 } else { unsafe { read_u64(tcp.cast_const().cast(), offset) } }
}

struct Search {
    ctx: *mut c_void,
    ends: Ends,
    cookie: u64,
    /// The id that was found.
    id: i64,
}

/// One id, and the agent's own namespace first; 0 goes on, 1 ends it.
extern "C" fn try_id(number: u64, search: *mut Search) -> u64 {
    // SAFETY: bpf_loop hands over the pointer that it was given.
    let search = unsafe { &mut *search };
    let id = number as i64 + OWN;
    // SAFETY: the context that the kernel called us with.
    let socket = unsafe { look_up(search.ctx, &search.ends, id) };
    if socket.is_null() {
        return 0;
    }
    // SAFETY: the helper that reads checks every address.
    let found = unsafe { word(socket, OFFSETS.load().skc_cookie) };
    // SAFETY: the reference of the lookup.
    unsafe { bpf_sk_release(socket) };
    if found != search.cookie {
        return 0;
    }
    search.id = id ^ zero(search.ends.agent.port) as i64;
    1
}

/// The established socket at the endpoint's end in the namespace with this id; null where there is none.
#[inline(always)]
unsafe fn look_up(ctx: *mut c_void, ends: &Ends, id: i64) -> *mut c_void {
    let Ends { agent, endpoint } = *ends;
    // As a packet to the endpoint has them: from the agent. A tuple is the addresses, then the ports, in network order.
    let ports = u32::from((agent.port as u16).to_be()) | u32::from((endpoint.port as u16).to_be()) << 16;
    let is_mapped = agent.address[0] == 0 && agent.address[1] == 0 && agent.address[2] == 0xffff_u32.to_be();
    if is_mapped {
        let mut tuple = [agent.address[3], endpoint.address[3], ports];
        let tuple_ptr = ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        // SAFETY: a tuple of IPv4, of this size.
        unsafe { bpf_sk_lookup_tcp(ctx, tuple_ptr, size_of_val(&tuple) as u32, id as u64, 0).cast() }
    } else {
        let mut tuple = Tuple6 { agent: agent.address, endpoint: endpoint.address, ports };
        let tuple_ptr = ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        // SAFETY: a tuple of IPv6, of this size.
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
