//! The word that both sides read and write. The model check (`tests/handover`) replaces it by one that tries every order in which
//! such accesses may become visible.

use core::{cell::UnsafeCell, sync::atomic::AtomicU64};

/// A word that both sides read while one of them may write. `get` and `set` are single, unordered accesses, because the eBPF back
/// end has no atomic loads and stores. Ordered accesses are [`atomic`](Self::atomic) on the host and the methods of
/// [`VerdictKernel`](crate::verdict::VerdictKernel) in the program.
#[repr(transparent)]
#[derive(Default)]
#[cfg_attr(feature = "user", derive(zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::KnownLayout))]
pub struct Word(UnsafeCell<u64>);

// SAFETY: every access is a volatile or atomic access of one aligned machine word.
unsafe impl Sync for Word {}

impl Word {
    /// Reads the word. Orders nothing.
    #[inline(always)]
    pub fn get(&self) -> u64 {
        // SAFETY: the pointer is valid and aligned for as long as `self` is.
        unsafe { self.0.get().read_volatile() }
    }

    /// Writes the word. Orders nothing.
    #[inline(always)]
    pub fn set(&self, value: u64) {
        // SAFETY: the pointer is valid and aligned for as long as `self` is.
        unsafe { self.0.get().write_volatile(value) }
    }

    /// Where it is, for the program's ordered accesses.
    pub const fn as_ptr(&self) -> *mut u64 {
        self.0.get()
    }

    /// The same word for ordered accesses, on the host only.
    #[inline(always)]
    pub const fn atomic(&self) -> &AtomicU64 {
        // SAFETY: AtomicU64 has the layout of u64, and all other accesses use the whole word.
        unsafe { AtomicU64::from_ptr(self.0.get()) }
    }
}
