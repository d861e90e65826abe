//! The slot: 128 bytes for each endpoint connection, in an array map that the agent has mapped into its memory.
//!
//! The agent arms a slot by storing `armed = consumed + 1` last, with release order; from then on the kernel owns
//! `framing`, `redir` and the stamps until it clears `armed`. `passed` belongs to the kernel always. Whatever ends an
//! armed span clears `armed` last, so an agent that reads `armed == 0` with acquire order sees everything written before.

use core::{cell::UnsafeCell, sync::atomic::AtomicU64};

use crate::framing::Framing;

/// A word that both sides read while one of them may write. `get` and `set` are single, unordered accesses (the eBPF
/// back end has no atomic loads and stores); order comes from [`atomic`](Self::atomic) on the host and from
/// [`Kernel`](crate::verdict::Kernel) in the program.
#[repr(transparent)]
#[derive(Default)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Word(UnsafeCell<u64>);

// SAFETY: every access is a volatile or atomic access of one aligned machine word.
unsafe impl Sync for Word {}

impl Word {
    #[inline(always)]
    pub fn get(&self) -> u64 {
        // SAFETY: the pointer is valid and aligned for as long as `self` is.
        unsafe { self.0.get().read_volatile() }
    }

    #[inline(always)]
    pub fn set(&self, value: u64) {
        // SAFETY: as above.
        unsafe { self.0.get().write_volatile(value) }
    }

    pub const fn as_ptr(&self) -> *mut u64 {
        self.0.get()
    }

    /// The same word with ordered accesses, for the host.
    #[inline(always)]
    pub const fn atomic(&self) -> &AtomicU64 {
        // SAFETY: AtomicU64 has the layout of u64, and all other accesses are of the whole word.
        unsafe { AtomicU64::from_ptr(self.0.get()) }
    }
}

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

    /// Metric label of a reason.
    pub const fn label(reason: u32) -> &'static str {
        match reason {
            REFUSED => "refused",
            FRAMING => "framing",
            ROOM => "room",
            TARGET => "target",
            FIN => "fin",
            _ => "none",
        }
    }
}

/// State of one endpoint connection. Times are CLOCK_MONOTONIC nanoseconds (`bpf_ktime_get_ns`).
#[repr(C)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Slot {
    /// 0: pass. Else `1 +` the value that `passed` must have for a redirect.
    pub armed: Word,
    /// Bytes let through to user space since the connection was made. Written by the kernel only.
    pub passed: Word,
    /// Bytes redirected since the connection was made.
    pub redir: Word,
    /// Key of the client's socket in the target map (its cookie).
    pub target: Word,
    /// Where the message stands after the last redirected byte.
    pub framing: Framing,
    /// `1 << 32 |` the target's `write_seq` at the first redirect of this arming, less `redir`; 0: not taken yet.
    pub wbase: u64,
    /// First and last redirect since `first_ns` was last zeroed.
    pub first_ns: Word,
    pub last_ns: Word,
    /// Segments redirected since the connection was made.
    pub segments: u64,
    /// One of [`stop`]: why the last armed span ended early.
    pub stop: u32,
    /// Not 0: copies of the payload go into the connection's ring ([`crate::tail`]). Written by the agent while released.
    pub keep: u32,
    /// `1 << 32 |` the TCP sequence number of the first byte that the endpoint sent; 0: none yet.
    pub origin: u64,
    /// Not 0: the kernel's account of the stream and the stream differ. Nothing read from the connection can be trusted.
    pub astray: Word,
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<Slot>() == 128);
const _: () = assert!(size_of::<Framing>() == 24);

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
    /// `struct sk_buff::cb`, which begins with `struct tcp_skb_cb::seq` in a receive queue.
    pub skb_cb: u32,
}
