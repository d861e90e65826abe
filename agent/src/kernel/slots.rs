//! The slots, mapped into our memory: one for each endpoint connection (layout and rules in `penstock_common::slot`).

use std::{
    num::NonZeroUsize,
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::Ordering::{Acquire, Relaxed, SeqCst},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use parking_lot::Mutex;
use penstock_common::{
    framing::Framing,
    slot::{Slot, Word},
};

/// The whole table. Lives as long as any slot of it is used.
pub struct Slots {
    base: NonNull<Slot>,
    count: u32,
    free: Mutex<Vec<u32>>,
}

// SAFETY: the memory is shared with the kernel anyway; access goes through atomics, or through `SlotRef` whose rules say
// who may write when.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl Slots {
    pub(super) fn map(fd: BorrowedFd<'_>, count: u32) -> std::io::Result<Self> {
        let bytes = NonZeroUsize::new(count as usize * size_of::<Slot>()).ok_or(std::io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of the array map's values, chosen by the kernel; the map has BPF_F_MMAPABLE.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Self { base: base.cast(), count, free: Mutex::new((0..count).rev().collect()) })
    }

    pub fn len(&self) -> u32 {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A slot for a new connection, by its index; taken once a connection, so workers hardly meet at the lock.
    pub fn take(&self) -> Option<u32> {
        self.free.lock().pop()
    }

    /// Takes back a slot that no verdict can touch any more.
    pub fn give_back(&self, index: u32) {
        self.free.lock().push(index);
    }

    /// The slot at `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn get(&self, index: u32) -> SlotRef<'_> {
        assert!(index < self.count, "slot {index} of {}", self.count);
        // SAFETY: inside the mapping, which lives as long as `self`.
        let slot = unsafe { self.base.add(index as usize) };
        SlotRef { slot, _slots: self }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; every SlotRef borrows `self`, so none is left. A failure leaves it mapped.
        let _ = unsafe { munmap(self.base.cast(), self.count as usize * size_of::<Slot>()) };
    }
}

/// Accessors of the slot's words.
macro_rules! words {
    ($($method:ident => $field:ident,)+) => {
        $(fn $method(&self) -> &Word {
            // SAFETY: inside the live mapping; words are accessed as whole words, and the plain fields between them are
            // never behind a reference, because the kernel writes them.
            unsafe { &(*self.slot.as_ptr()).$field }
        })+
    };
}

/// One slot, as its endpoint connection's owner sees it. Fields other than the words may be touched only while the slot is
/// released (`armed == 0`), which the methods see to.
#[derive(Clone, Copy)]
pub struct SlotRef<'a> {
    slot: NonNull<Slot>,
    _slots: &'a Slots,
}

impl SlotRef<'_> {
    words! {
        armed => armed,
        passed_word => passed,
        redir => redir,
        target => target,
        first_ns => first_ns,
        last_ns => last_ns,
        astray => astray,
    }

    /// Everything back to zero, before the connection is known to the kernel program.
    pub fn reset(&self) {
        // SAFETY: no connection has this slot, so the kernel does not touch it; zero is a valid Slot.
        unsafe { self.slot.as_ptr().write_bytes(0, 1) };
    }

    /// Starts a message: its stamps begin anew. Only while released.
    pub fn begin_message(&self) {
        debug_assert!(self.is_released());
        self.first_ns().set(0);
        self.last_ns().set(0);
    }

    /// Hands the rest of the message to the kernel: redirect to `target` while exactly `consumed` bytes have been let
    /// through, and with `keep` copy the payload into the connection's ring. Only while released.
    pub fn arm(&self, target: u64, framing: Framing, consumed: u64, keep: bool) {
        debug_assert!(self.is_released());
        let slot = self.slot.as_ptr();
        // SAFETY: released, so these fields are ours.
        unsafe {
            (&raw mut (*slot).framing).write_volatile(framing);
            (&raw mut (*slot).wbase).write_volatile(0);
            (&raw mut (*slot).stop).write_volatile(0);
            (&raw mut (*slot).keep).write_volatile(u32::from(keep));
        }
        self.target().set(target);
        self.armed().atomic().store(consumed + 1, SeqCst);
    }

    /// The kernel has let go of the slot: what it wrote may be read.
    pub fn is_released(&self) -> bool {
        self.armed().atomic().load(Acquire) == 0
    }

    /// Takes the slot back although the kernel has not let go. Only when no redirect can happen any more: the arming was
    /// refused, the endpoint has closed, or the connection is broken off.
    pub fn disarm(&self) {
        self.armed().atomic().store(0, SeqCst);
    }

    /// Where the message stands. Only while released.
    pub fn framing(&self) -> Framing {
        debug_assert!(self.is_released());
        // SAFETY: released, so the kernel does not write it.
        unsafe { (&raw const (*self.slot.as_ptr()).framing).read_volatile() }
    }

    /// Why the kernel stopped, one of `penstock_common::slot::stop`. Only while released.
    pub fn stop(&self) -> u32 {
        // SAFETY: a whole aligned word.
        unsafe { (&raw const (*self.slot.as_ptr()).stop).read_volatile() }
    }

    /// Bytes let through to user space since the connection was made.
    pub fn passed(&self) -> u64 {
        self.passed_word().atomic().load(Acquire)
    }

    /// What the kernel let through cannot be trusted any more: the connection must be broken off.
    pub fn is_astray(&self) -> bool {
        self.astray().get() != 0
    }

    /// Bytes redirected since the connection was made; may grow while armed.
    pub fn redirected(&self) -> u64 {
        self.redir().atomic().load(Acquire)
    }

    /// Segments redirected since the connection was made.
    pub fn segments(&self) -> u64 {
        // SAFETY: a whole aligned word.
        unsafe { (&raw const (*self.slot.as_ptr()).segments).read_volatile() }
    }

    /// First and last redirect of the message, CLOCK_MONOTONIC ns; 0: none yet.
    pub fn stamps(&self) -> (u64, u64) {
        (self.first_ns().atomic().load(Relaxed), self.last_ns().atomic().load(Relaxed))
    }
}
