//! The slots: 128 bytes for each endpoint connection and path, in array maps that the agent has mapped into its memory.
//!
//! Both kinds contain a [`Span`]. The agent arms it by storing `armed` last, with release order. Then the kernel owns `framing`,
//! `redir` and the stamps until it clears `armed`, which is its last store: an agent that reads `armed == 0` with acquire order
//! sees everything written before. Only the kernel writes `passed`.

use crate::framing::Framing;
pub use crate::word::Word;

/// Why the kernel disarmed a slot before the end of the message; `0` means that it did not.
pub mod stop {
    /// When the agent armed, it had not consumed every byte that was passed to user space.
    pub const REFUSED: u32 = 1;
    /// The segment does not end inside the message, violates its syntax, or has more syntax than one call may read.
    pub const FRAMING: u32 = 2;
    /// The client's send buffer has no room for the segment.
    pub const ROOM: u32 = 3;
    /// The client's socket is not in the target map, or the kernel refused the redirect.
    pub const TARGET: u32 = 4;
    /// The endpoint has closed its side.
    pub const FIN: u32 = 5;
    /// Not everything redirected before has reached the client's send queue.
    pub const BEHIND: u32 = 6;
    /// The sender tracks its own send queue (`SO_ZEROCOPY`, or another Penstock), which a redirect would bypass.
    pub const ACCOUNT: u32 = 7;
    /// The segment holds chunk syntax in memory that the sender can still write (`sendfile`, `splice`, `vmsplice`).
    pub const SHARED: u32 = 8;
    /// The number of values, including 0.
    pub const COUNT: usize = 9;

    /// The metric label of a value.
    pub const fn label(reason: u32) -> &'static str {
        match reason {
            REFUSED => "refused",
            FRAMING => "framing",
            ROOM => "room",
            TARGET => "target",
            FIN => "fin",
            BEHIND => "behind",
            ACCOUNT => "account",
            SHARED => "shared",
            _ => "none",
        }
    }
}

/// The part of a slot that agent and kernel hand over, the same for both paths. Times are CLOCK_MONOTONIC nanoseconds
/// (`bpf_ktime_get_ns`).
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Span {
    /// 0: disarmed. Otherwise the position at which the stream must be for a redirect, as the path counts it.
    pub armed: Word,
    /// Bytes redirected since the connection was made.
    pub redir: Word,
    /// Key of the client's socket in the target map (its cookie).
    pub target: Word,
    /// The position in the message after the last redirected byte.
    pub framing: Framing,
    /// First redirect since the agent last zeroed this; 0: none.
    pub first_ns: Word,
    /// Last redirect since then.
    pub last_ns: Word,
    /// Segments or messages redirected since the connection was made.
    pub segments: u64,
    /// One of [`stop`]: why the last armed span ended early.
    pub stop: u32,
    /// Not 0: copy the payload to the connection's ring ([`crate::tail`]). The agent writes it while the slot is disarmed.
    pub keep: u32,
}

/// The state of one connection on path `ingress`, for the verdict on its segments.
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Slot {
    /// `armed` is `1 +` the value that `passed` must have for a redirect.
    pub span: Span,
    /// Bytes passed to user space since the connection was made. Only the kernel writes it.
    pub passed: Word,
    /// `1 << 32 |` the target's `write_seq` at the first redirect of this arming, minus `redir`; 0: no redirect yet.
    pub wbase: u64,
    /// `1 << 32 |` the TCP sequence number of the first byte that the peer sent; 0: none yet.
    pub origin: u64,
    /// Not 0: the kernel's count differs from the stream. Bytes read from the connection cannot be trusted.
    pub astray: Word,
    /// Unused, so that a slot takes two cache lines.
    pub reserved: [u64; 2],
}

/// The state of one connection on path `local`, about the endpoint's own socket on this machine.
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct LocalSlot {
    /// `armed` is `1 << 32 |` the value that the endpoint's `write_seq` must have for a redirect.
    pub span: Span,
    /// `1 << 32 |` the target's `write_seq` after everything redirected in this arming has arrived; 0: no redirect yet.
    pub expected: u64,
    /// `1 << 32 |` the endpoint's `write_seq` before its first byte. `sock_ops` writes it when the connection is made.
    pub origin: Word,
    /// Cookie of the endpoint's socket; 0: not recognised.
    pub peer: Word,
    /// Cookie of the client whose socket the verdict has found; 0: none. Only the verdict writes it.
    pub found: Word,
    /// Unused, so that a slot takes two cache lines.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<Slot>() == 128 && size_of::<LocalSlot>() == 128);
const _: () = assert!(size_of::<Framing>() == 24);

/// The agent's request to the program `penstock_admit`: the packet of a test run (`BPF_PROG_TEST_RUN`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Admission {
    /// Cookie of the agent's own socket of the connection.
    pub connection: u64,
    /// 0: insert the endpoint's socket into the map. Otherwise: remove it.
    pub leave: u64,
    /// 0: do not insert a socket on which calls may block.
    pub blocking: u64,
}

/// The result of an [`Admission`].
pub mod admission {
    /// The endpoint's socket is in the map, or has left it if that was asked for.
    pub const DONE: u32 = 0;
    /// The endpoint's socket is not recognised, or is closed.
    pub const UNKNOWN: u32 = 1;
    /// The endpoint's socket is in no network namespace that the agent's namespace has an id for.
    pub const ELSEWHERE: u32 = 2;
    /// The endpoint has not read the whole request.
    pub const UNREAD: u32 = 3;
    /// The endpoint tracks what its socket sends.
    pub const ACCOUNT: u32 = 4;
    /// The kernel refused the socket: another program has it in a map.
    pub const REFUSED: u32 = 5;
    /// The socket has left the map, but a call of the endpoint still uses the map's state.
    pub const IN_USE: u32 = 6;
    /// The endpoint's calls on its socket block.
    pub const BLOCKING: u32 = 7;

    /// The name of a result in logs.
    pub const fn label(outcome: u32) -> &'static str {
        match outcome {
            DONE => "done",
            UNKNOWN => "unknown",
            ELSEWHERE => "elsewhere",
            UNREAD => "unread",
            ACCOUNT => "account",
            REFUSED => "refused",
            IN_USE => "in_use",
            BLOCKING => "blocking",
            _ => "failed",
        }
    }
}

/// Offsets in the kernel's structures. The agent reads them from BTF at load and sets them as a global of the program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Offsets {
    /// `struct sock::sk_wmem_queued`: bytes of memory in the send queue.
    pub sk_wmem_queued: u32,
    /// `struct sock::sk_sndbuf`: its limit.
    pub sk_sndbuf: u32,
    /// `struct tcp_sock::write_seq`: sequence number after the last written byte.
    pub write_seq: u32,
    /// `struct tcp_sock::max_window`, the largest window that the peer has offered.
    pub max_window: u32,
    /// `struct tcp_sock::mss_cache`, the payload bytes of a full segment.
    pub mss_cache: u32,
    /// `struct sk_buff::cb`, which begins with `struct tcp_skb_cb::seq` in a receive queue.
    pub skb_cb: u32,
    /// `struct sk_msg::sk`: the sender's socket.
    pub msg_sk: u32,
    /// `struct sk_msg::data`: the start of the first contiguous piece of the message.
    pub msg_data: u32,
    /// `struct sk_msg::data_end`: the end of that piece.
    pub msg_data_end: u32,
    /// `struct bpf_sock_ops_kern::sk`: the socket.
    pub ops_sk: u32,
    /// `struct sock_common::skc_cookie`.
    pub skc_cookie: u32,
    /// `struct sock_common::skc_flags`, some of which are in `accounts`.
    pub skc_flags: u32,
    /// Bits of `skc_flags` of sockets whose owner tracks the send queue: SOCK_ZEROCOPY (the owner waits for completions), and
    /// SOCK_RXQ_OVFL, which means nothing to TCP and marks Penstock's own sockets.
    pub accounts: u32,
    /// `struct tcp_sock::copied_seq`: sequence number after the last byte that the owner has read.
    pub copied_seq: u32,
    /// `struct sock::sk_user_data`: not null while the socket is in a socket map.
    pub sk_user_data: u32,
    /// `struct sock::sk_socket`: the way to `file_flags`.
    pub sk_socket: u32,
    /// `struct socket::file`, the next step of it.
    pub socket_file: u32,
    /// `struct file::f_flags`: whether calls on the socket block.
    pub file_flags: u32,
    /// `struct sock::sk_tsflags`: the time stamps that the owner asks for (SO_TIMESTAMPING).
    pub sk_tsflags: u32,
    /// `struct sk_buff::head`: the start of its memory.
    pub skb_head: u32,
    /// `struct sk_buff::end`: where its `struct skb_shared_info` begins.
    pub skb_end: u32,
    /// `struct skb_shared_info::flags`.
    pub shared_flags: u32,
    /// `struct skb_shared_info::nr_frags`: how many of `frags` are in use.
    pub shared_nr_frags: u32,
    /// `struct skb_shared_info::frag_list`: further buffers of the same segment.
    pub shared_frag_list: u32,
    /// `struct skb_shared_info::frags`: the pages.
    pub shared_frags: u32,
    /// `struct page::compound_head`: the first page of a larger one.
    pub page_compound_head: u32,
    /// `struct page::mapping`: what the page belongs to.
    pub page_mapping: u32,
}
