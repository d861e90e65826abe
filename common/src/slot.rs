//! The slots: for each endpoint connection 128 bytes for either path, in array maps that the agent has mapped into its
//! memory.
//!
//! What both have is a [`Span`]: the agent hands a flow over by storing `armed` last, with release order; from then on the
//! kernel owns `framing`, `redir` and the stamps until it clears `armed`. Whatever ends an armed span clears `armed` last, so
//! an agent that reads `armed == 0` with acquire order sees everything written before. `passed` belongs to the kernel always.

use crate::framing::Framing;
pub use crate::word::Word;

/// Why the kernel stopped redirecting; `0` is "it has not".
pub mod stop {
    /// Bytes had reached user space that the agent had not consumed when it armed.
    pub const REFUSED: u32 = 1;
    /// The segment does not end inside the message, breaks its syntax, or has more syntax than one call may look at.
    pub const FRAMING: u32 = 2;
    /// The client's send buffer has no room for the segment.
    pub const ROOM: u32 = 3;
    /// The client's socket is not in the target map, or the redirect was not taken.
    pub const TARGET: u32 = 4;
    /// The endpoint has closed its side.
    pub const FIN: u32 = 5;
    /// Not all that was redirected before has reached the client's send queue.
    pub const BEHIND: u32 = 6;
    /// The sender keeps an account of its own socket's queue (`SO_ZEROCOPY`, or another Penstock), which a redirect would bypass.
    pub const ACCOUNT: u32 = 7;
    /// The segment holds chunk syntax in memory that the sender can still write (`sendfile`, `splice`, `vmsplice`).
    pub const SHARED: u32 = 8;
    /// How many there are, with "it has not".
    pub const COUNT: usize = 9;

    /// Metric label of a reason.
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

/// What the agent hands to the kernel and takes back, whatever the path. Times are CLOCK_MONOTONIC nanoseconds
/// (`bpf_ktime_get_ns`).
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Span {
    /// 0: pass. Else where the stream has to stand for a redirect, as the path counts it.
    pub armed: Word,
    /// Bytes redirected since the connection was made.
    pub redir: Word,
    /// Key of the client's socket in the target map (its cookie).
    pub target: Word,
    /// Where the message stands after the last redirected byte.
    pub framing: Framing,
    /// First and last redirect since `first_ns` was last zeroed.
    pub first_ns: Word,
    pub last_ns: Word,
    /// Segments or messages redirected since the connection was made.
    pub segments: u64,
    /// One of [`stop`]: why the last armed span ended early.
    pub stop: u32,
    /// Not 0: copies of the payload go into the connection's ring ([`crate::tail`]). Written by the agent while released.
    pub keep: u32,
}

/// The ingress path's state of one connection: what the verdict on its segments knows.
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Slot {
    /// `armed` is `1 +` the value that `passed` must have for a redirect.
    pub span: Span,
    /// Bytes let through to user space since the connection was made. Written by the kernel only.
    pub passed: Word,
    /// `1 << 32 |` the target's `write_seq` at the first redirect of this arming, less `redir`; 0: not taken yet.
    pub wbase: u64,
    /// `1 << 32 |` the TCP sequence number of the first byte that the peer sent; 0: none yet.
    pub origin: u64,
    /// Not 0: the kernel's account of the stream and the stream differ. Nothing read from the connection can be trusted.
    pub astray: Word,
    pub reserved: [u64; 2],
}

/// The local path's state of one connection: what is known of the endpoint's own socket, which lives on this machine.
#[repr(C)]
#[cfg_attr(all(feature = "user", not(test)), derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct LocalSlot {
    /// `armed` is `1 << 32 |` the value that the endpoint's `write_seq` must have for a redirect.
    pub span: Span,
    /// `1 << 32 |` the target's `write_seq` as it is when everything redirected in this arming has arrived; 0: none yet.
    pub expected: u64,
    /// `1 << 32 |` the endpoint's `write_seq` before its first byte. Written when the connection is made.
    pub origin: Word,
    /// Cookie of the endpoint's socket, once it has been recognised; 0: it has not.
    pub peer: Word,
    /// Cookie of the client whose socket the kernel has found; 0: none. Written by the verdict on what the endpoint sends.
    pub found: Word,
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<Slot>() == 128 && size_of::<LocalSlot>() == 128);
const _: () = assert!(size_of::<Framing>() == 24);

/// What the agent asks of the admission program, as the packet of a test run (`BPF_PROG_TEST_RUN`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Admission {
    /// Cookie of the agent's own socket of the connection.
    pub connection: u64,
    /// 0: put the endpoint's socket into the map. Else: take it out.
    pub leave: u64,
}

/// What came of an [`Admission`].
pub mod admission {
    pub const DONE: u32 = 0;
    /// The endpoint's socket is not known, or is gone.
    pub const UNKNOWN: u32 = 1;
    /// No network namespace that the agent's has an id for holds the endpoint's socket.
    pub const ELSEWHERE: u32 = 2;
    /// The endpoint has not read the whole request.
    pub const UNREAD: u32 = 3;
    /// The endpoint keeps an account of what its socket sends.
    pub const ACCOUNT: u32 = 4;
    /// The kernel refuses the socket: another program has it in a map.
    pub const REFUSED: u32 = 5;
    /// The socket has left the map, and a call of the endpoint's still uses what the map had made of it.
    pub const IN_USE: u32 = 6;

    /// One word for logs.
    pub const fn label(outcome: u32) -> &'static str {
        match outcome {
            DONE => "done",
            UNKNOWN => "unknown",
            ELSEWHERE => "elsewhere",
            UNREAD => "unread",
            ACCOUNT => "account",
            REFUSED => "refused",
            IN_USE => "in_use",
            _ => "failed",
        }
    }
}

/// Offsets into the kernel's own structures, read from its BTF at load and handed to the program as a global.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Offsets {
    /// `struct sock::sk_wmem_queued`: bytes of memory that the send queue holds.
    pub sk_wmem_queued: u32,
    /// `struct sock::sk_sndbuf`: its limit.
    pub sk_sndbuf: u32,
    /// `struct tcp_sock::write_seq`: sequence number behind the last byte written.
    pub write_seq: u32,
    /// `struct tcp_sock::max_window`, the largest window that the peer has offered, and `mss_cache`.
    pub max_window: u32,
    pub mss_cache: u32,
    /// `struct sk_buff::cb`, which begins with `struct tcp_skb_cb::seq` in a receive queue.
    pub skb_cb: u32,
    /// `struct sk_msg::sk`, `data` and `data_end`: whose message it is, and the part of it that lies in one piece.
    pub msg_sk: u32,
    pub msg_data: u32,
    pub msg_data_end: u32,
    /// `struct bpf_sock_ops_kern::sk`: whose connection it is about.
    pub ops_sk: u32,
    /// `struct sock_common::skc_cookie` and `skc_flags`.
    pub skc_cookie: u32,
    pub skc_flags: u32,
    /// Bits of `skc_flags` that say that the owner keeps an account of the socket's queue: SOCK_ZEROCOPY (it waits to be told
    /// what has been sent), and SOCK_RXQ_OVFL, which means nothing to TCP and marks Penstock's own.
    pub accounts: u32,
    /// `struct tcp_sock::copied_seq`: sequence number behind the last byte that the owner has read.
    pub copied_seq: u32,
    /// `struct sock::sk_user_data`: not null while the socket is in a socket map.
    pub sk_user_data: u32,
    /// `struct sock::sk_tsflags`: the time stamps that the owner asks for (SO_TIMESTAMPING).
    pub sk_tsflags: u32,
    /// `struct sk_buff::head` and `end`: where its `struct skb_shared_info` begins.
    pub skb_head: u32,
    pub skb_end: u32,
    /// `struct skb_shared_info::flags`, `nr_frags`, `frag_list` and `frags`.
    pub shared_flags: u32,
    pub shared_nr_frags: u32,
    pub shared_frag_list: u32,
    pub shared_frags: u32,
    /// `struct page::compound_head` and `mapping`.
    pub page_compound_head: u32,
    pub page_mapping: u32,
}
