//! The slots, mapped into our memory: for each connection that may be steered one of either path (layout and rules in
//! `penstock_common::slot`).

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
    slot::{LocalSlot, Slot, Span, Word},
};

use super::grace::Grace;

/// The whole table. Lives as long as any slot of it is used.
pub struct Slots {
    slots: Mapping<Slot>,
    locals: Mapping<LocalSlot>,
    count: u32,
    free: Mutex<Vec<u32>>,
    /// Given back, while a message program may still be at work on them.
    retired: Mutex<Vec<u32>>,
    /// Held while what has been retired is neither there nor free.
    reclaiming: Mutex<()>,
    grace: Grace,
}

impl Slots {
    pub(super) fn map(slots: BorrowedFd<'_>, locals: BorrowedFd<'_>, count: u32) -> std::io::Result<Self> {
        let (slots, locals) = (Mapping::new(slots, count)?, Mapping::new(locals, count)?);
        let (free, retired, reclaiming) = (Mutex::new((0..count).rev().collect()), Mutex::default(), Mutex::default());
        Ok(Self { slots, locals, count, free, retired, reclaiming, grace: Grace::new()? })
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

    /// Takes back a slot that no program can touch any more.
    pub fn give_back(&self, index: u32) {
        self.free.lock().push(index);
    }

    /// As [`give_back`](Self::give_back), of a connection whose endpoint's socket lives on: a message program that has
    /// begun, on another processor, may still be at work on the slots.
    pub fn retire(&self, index: u32) {
        self.retired.lock().push(index);
    }

    /// No connection would get a slot now.
    pub fn is_exhausted(&self) -> bool {
        self.free.lock().is_empty()
    }

    /// Frees what has been retired, after every program that has begun is done. Takes some milliseconds. Of two callers the second
    /// returns when what the first has found is free.
    pub fn reclaim(&self) {
        self.reclaim_after(|| self.grace.wait());
    }

    /// Where the wait fails, what has been retired stays retired.
    fn reclaim_after(&self, wait: impl FnOnce() -> std::io::Result<()>) {
        let _one = self.reclaiming.lock();
        let retired = std::mem::take(&mut *self.retired.lock());
        if retired.is_empty() {
            return;
        }
        match wait() {
            Ok(()) => self.free.lock().extend(retired),
            Err(error) => {
                tracing::warn!(%error, slots = retired.len(), "could not wait for kernel programs, keeping slots retired");
                self.retired.lock().extend(retired);
            }
        }
    }

    /// The slots at `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn get(&self, index: u32) -> SlotRef<'_> {
        SlotRef { slot: self.slots.at(index), local: self.locals.at(index), slots: self }
    }
}

/// The values of an array map, in our memory.
struct Mapping<T> {
    base: NonNull<T>,
    count: u32,
}

// SAFETY: the memory is shared with the kernel anyway; access goes through atomics, or through `SlotRef` and `SpanRef` whose
// rules say who may write when.
unsafe impl<T> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mapping<T> {}

impl<T> Mapping<T> {
    fn new(map: BorrowedFd<'_>, count: u32) -> std::io::Result<Self> {
        let bytes = NonZeroUsize::new(count as usize * size_of::<T>()).ok_or(std::io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of the array map's values, chosen by the kernel; the map has BPF_F_MMAPABLE.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { base: base.cast(), count })
    }

    fn at(&self, index: u32) -> NonNull<T> {
        assert!(index < self.count, "slot {index} of {}", self.count);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { self.base.add(index as usize) }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; every SlotRef borrows the table, so none is left. A failure leaves it mapped.
        let _ = unsafe { munmap(self.base.cast(), self.count as usize * size_of::<T>()) };
    }
}

/// Accessors of a structure's words.
macro_rules! words {
    ($($method:ident => $base:ident.$field:ident,)+) => {
        $(fn $method(&self) -> &Word {
            // SAFETY: inside the live mapping; words are accessed as whole words, and the plain fields between them are
            // never behind a reference, because the kernel writes them.
            unsafe { &(*self.$base.as_ptr()).$field }
        })+
    };
}

/// Who moves the bytes of a span in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The verdict, when the endpoint's bytes have arrived at our socket.
    Ingress,
    /// The endpoint's own `sendmsg`.
    Local,
}

/// One connection's slots, as its owner sees them. Fields other than the words may be touched only while the span is
/// released (`armed == 0`), which the methods see to.
#[derive(Clone, Copy)]
pub struct SlotRef<'a> {
    slot: NonNull<Slot>,
    local: NonNull<LocalSlot>,
    slots: &'a Slots,
}

impl<'a> SlotRef<'a> {
    words! {
        passed_word => slot.passed,
        astray => slot.astray,
        origin => local.origin,
        peer_word => local.peer,
        found => local.found,
    }

    /// Everything back to zero, before the connection is known to the kernel programs.
    pub fn reset(&self) {
        // SAFETY: no connection has these slots, so the kernel does not touch them; zero is a valid value of both.
        unsafe {
            self.slot.as_ptr().write_bytes(0, 1);
            self.local.as_ptr().write_bytes(0, 1);
        }
    }

    /// What is handed over and taken back on one of the paths.
    pub fn span(&self, lane: Lane) -> SpanRef<'a> {
        // SAFETY: fields of live slots.
        let span = unsafe {
            match lane {
                Lane::Ingress => &raw mut (*self.slot.as_ptr()).span,
                Lane::Local => &raw mut (*self.local.as_ptr()).span,
            }
        };
        SpanRef { span: NonNull::new(span).expect("a field of a live slot"), _slots: self.slots }
    }

    /// Hands the rest of the message to the kernel: redirect to `target` while exactly `consumed` bytes have reached user
    /// space, and with `keep` (the ingress path alone) copy the payload into the connection's ring. Only while released.
    pub fn arm(&self, lane: Lane, target: u64, framing: Framing, consumed: u64, keep: bool) {
        let span = self.span(lane);
        debug_assert!(span.is_released());
        // SAFETY: released, so these fields are ours.
        let armed = unsafe {
            match lane {
                Lane::Ingress => {
                    (&raw mut (*self.slot.as_ptr()).wbase).write_volatile(0);
                    consumed + 1
                }
                Lane::Local => {
                    (&raw mut (*self.local.as_ptr()).expected).write_volatile(0);
                    // What the other lane has redirected was sent over the connection too.
                    let sent = consumed.wrapping_add(self.span(Lane::Ingress).redirected()) as u32;
                    1 << 32 | u64::from((self.origin().get() as u32).wrapping_add(sent))
                }
            }
        };
        span.arm(target, framing, armed, keep);
    }

    /// The flow is taken back on both paths although the kernel has not let go. Only when no redirect can happen any more:
    /// the arming was refused, the endpoint has closed, or the connection is broken off.
    pub fn disarm(&self) {
        self.span(Lane::Ingress).disarm();
        self.span(Lane::Local).disarm();
    }

    /// Bytes let through to user space since the connection was made.
    pub fn passed(&self) -> u64 {
        self.passed_word().atomic().load(Acquire)
    }

    /// What the kernel let through cannot be trusted any more: the connection must be broken off.
    pub fn is_astray(&self) -> bool {
        self.astray().get() != 0
    }

    /// Cookie of the endpoint's own socket, where that is on this machine and has been recognised.
    pub fn peer(&self) -> Option<u64> {
        Some(self.peer_word().atomic().load(Acquire)).filter(|&cookie| cookie != 0)
    }

    /// The next response is for the client with this key: the kernel looks for its socket when the response comes.
    pub fn announce(&self, target: u64) {
        self.span(Lane::Local).target().set(target);
    }

    /// The kernel has found the client that was announced.
    pub fn has_found(&self, target: u64) -> bool {
        self.found().atomic().load(Acquire) == target
    }
}

/// One span, as its owner sees it; the rule is that of [`SlotRef`].
#[derive(Clone, Copy)]
pub struct SpanRef<'a> {
    span: NonNull<Span>,
    _slots: &'a Slots,
}

impl SpanRef<'_> {
    words! {
        armed => span.armed,
        redir => span.redir,
        target => span.target,
        first_ns => span.first_ns,
        last_ns => span.last_ns,
    }

    /// Starts a message: its stamps begin anew. Only while released.
    pub fn begin_message(&self) {
        debug_assert!(self.is_released());
        self.first_ns().set(0);
        self.last_ns().set(0);
    }

    fn arm(&self, target: u64, framing: Framing, armed: u64, keep: bool) {
        let span = self.span.as_ptr();
        // SAFETY: released, so these fields are ours.
        unsafe {
            (&raw mut (*span).framing).write_volatile(framing);
            (&raw mut (*span).stop).write_volatile(0);
            (&raw mut (*span).keep).write_volatile(u32::from(keep));
        }
        self.target().set(target);
        self.armed().atomic().store(armed, SeqCst);
    }

    /// The kernel has let go of the span: what it wrote may be read.
    pub fn is_released(&self) -> bool {
        self.armed().atomic().load(Acquire) == 0
    }

    /// As [`SlotRef::disarm`], on this path.
    pub fn disarm(&self) {
        self.armed().atomic().store(0, SeqCst);
    }

    /// Where the message stands. Only while released.
    pub fn framing(&self) -> Framing {
        debug_assert!(self.is_released());
        // SAFETY: released, so the kernel does not write it.
        unsafe { (&raw const (*self.span.as_ptr()).framing).read_volatile() }
    }

    /// Why the kernel stopped, one of `penstock_common::slot::stop`. Only while released.
    pub fn stop(&self) -> u32 {
        // SAFETY: a whole aligned word.
        unsafe { (&raw const (*self.span.as_ptr()).stop).read_volatile() }
    }

    /// Bytes redirected since the connection was made; may grow while armed.
    pub fn redirected(&self) -> u64 {
        self.redir().atomic().load(Acquire)
    }

    /// Segments or messages redirected since the connection was made.
    pub fn segments(&self) -> u64 {
        // SAFETY: a whole aligned word.
        unsafe { (&raw const (*self.span.as_ptr()).segments).read_volatile() }
    }

    /// First and last redirect of the message, CLOCK_MONOTONIC ns; 0: none yet.
    pub fn stamps(&self) -> (u64, u64) {
        (self.first_ns().atomic().load(Relaxed), self.last_ns().atomic().load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use crate::kernel::Kernel;

    #[test]
    fn retired_slot_is_freed_only_after_the_programs_have_ended() {
        let kernel = Kernel::load(1).expect("load");
        let slots = kernel.slots();
        let index = slots.take().expect("a slot");
        slots.retire(index);
        slots.reclaim_after(|| Err(io::ErrorKind::InvalidInput.into()));
        assert_eq!(slots.take(), None, "freed although nobody has waited");
        slots.reclaim();
        assert_eq!(slots.take(), Some(index));
    }
}
