//! The slots, mapped into the agent's memory: each connection that may be steered has one for each path. Layout and
//! rules are in `penstock_common::slot`.

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
    path::Path,
    slot::{LocalSlot, Slot, Span, Word},
};

use super::grace::Grace;

/// The whole table. Lives as long as any of its slots is used.
pub struct Slots {
    slots: Mapping<Slot>,
    locals: Mapping<LocalSlot>,
    count: u32,
    free: Mutex<Vec<u32>>,
    /// Slots given back while a message program may still use them.
    retired: Mutex<Vec<u32>>,
    /// Held while retired slots are being moved to `free`.
    reclaiming: Mutex<()>,
    grace: Grace,
}

/// Slots that are not free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotsInUse {
    pub all: usize,
    /// Those of them whose connections have closed.
    pub retired: usize,
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

    /// Takes a slot for a new connection; returns its index. Called once per connection, so workers rarely contend for
    /// the lock.
    pub fn take(&self) -> Option<u32> {
        self.free.lock().pop()
    }

    /// Frees a slot that no program can use any more.
    pub fn give_back(&self, index: u32) {
        self.free.lock().push(index);
    }

    /// Like [`give_back`](Self::give_back), for a connection whose endpoint socket still exists: a message program
    /// running on another CPU may still use the slot.
    pub fn retire(&self, index: u32) {
        self.retired.lock().push(index);
    }

    /// Whether no slot is free.
    pub fn is_exhausted(&self) -> bool {
        self.free.lock().is_empty()
    }

    /// How many slots are not free.
    pub fn in_use(&self) -> SlotsInUse {
        let free = self.free.lock().len();
        SlotsInUse { all: self.count as usize - free, retired: self.retired.lock().len() }
    }

    /// Frees the retired slots after every running program has ended. Takes some milliseconds. A concurrent second call
    /// returns after the first has freed the slots it found.
    pub fn reclaim(&self) {
        self.reclaim_after(|| self.grace.wait());
    }

    /// If `wait` fails, the retired slots stay retired.
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

    /// The slots of both paths at `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn get(&self, index: u32) -> SlotRef<'_> {
        SlotRef { slot: self.slots.at(index), local: self.locals.at(index), slots: self }
    }
}

/// The values of an array map, mapped into the agent's memory.
pub(super) struct Mapping<T> {
    base: NonNull<T>,
    count: u32,
}

// SAFETY: the memory is shared with the kernel anyway. Access goes through atomics, or through `SlotRef` and `SpanRef`,
// whose rules say who may write when.
unsafe impl<T> Send for Mapping<T> {}
// SAFETY: the same argument as for `Send`.
unsafe impl<T> Sync for Mapping<T> {}

impl<T> Mapping<T> {
    pub(super) fn new(map: BorrowedFd<'_>, count: u32) -> std::io::Result<Self> {
        let bytes = NonZeroUsize::new(count as usize * size_of::<T>()).ok_or(std::io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses; the map has BPF_F_MMAPABLE.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { base: base.cast(), count })
    }

    pub(super) fn at(&self, index: u32) -> NonNull<T> {
        assert!(index < self.count, "slot {index} of {}", self.count);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { self.base.add(index as usize) }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: unmaps the mapping made in `new`. Every SlotRef borrows the table, so none exists. A failure leaves
        // it mapped.
        let _ = unsafe { munmap(self.base.cast(), self.count as usize * size_of::<T>()) };
    }
}

/// Accessors of a structure's words.
macro_rules! words {
    ($($method:ident => $base:ident.$field:ident,)+) => {
        $(fn $method(&self) -> &Word {
            // SAFETY: inside the live mapping. Words are accessed as whole words; no reference is made to the plain
            // fields between them, because the kernel writes those.
            unsafe { &(*self.$base.as_ptr()).$field }
        })+
    };
}

/// One connection's slots, for their owner. Fields other than the words may be accessed only while the span is released
/// (`armed == 0`); the methods enforce this.
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

    /// Sets everything to zero, before the kernel programs know the connection.
    pub fn reset(&self) {
        // SAFETY: no connection has these slots, so the kernel does not access them; zero is a valid value of both.
        unsafe {
            self.slot.as_ptr().write_bytes(0, 1);
            self.local.as_ptr().write_bytes(0, 1);
        }
    }

    /// The part that is armed and reclaimed on this path. `None` if user space carries the bytes.
    pub fn span(&self, path: Path) -> Option<SpanRef<'a>> {
        match path {
            Path::Local => Some(self.local()),
            Path::Ingress => Some(self.ingress()),
            Path::Wire | Path::Relay => None,
        }
    }

    /// The span of path ingress.
    pub fn ingress(&self) -> SpanRef<'a> {
        // SAFETY: a field of a live slot.
        self.span_at(unsafe { &raw mut (*self.slot.as_ptr()).span })
    }

    /// The span of path local.
    pub fn local(&self) -> SpanRef<'a> {
        // SAFETY: a field of a live slot.
        self.span_at(unsafe { &raw mut (*self.local.as_ptr()).span })
    }

    fn span_at(&self, span: *mut Span) -> SpanRef<'a> {
        SpanRef { span: NonNull::new(span).expect("a field of a live slot"), _slots: self.slots }
    }

    /// Hands the rest of the message over to the kernel: it redirects to `target` as long as exactly `consumed` bytes
    /// have reached user space, and with `keep` copies the payload into the connection's ring. Only while released.
    pub fn arm(&self, path: Path, target: u64, framing: Framing, consumed: u64, keep: bool) {
        let Some(span) = self.span(path) else { return };
        debug_assert!(span.is_released());
        // SAFETY: released, so the kernel does not access these fields.
        let armed = unsafe {
            match path {
                Path::Ingress => {
                    (&raw mut (*self.slot.as_ptr()).wbase).write_volatile(0);
                    consumed + 1
                }
                _ => {
                    (&raw mut (*self.local.as_ptr()).expected).write_volatile(0);
                    // Bytes that the other path redirected were sent over the connection too.
                    let sent = consumed.wrapping_add(self.ingress().redirected()) as u32;
                    1 << 32 | u64::from((self.origin().get() as u32).wrapping_add(sent))
                }
            }
        };
        span.arm(target, framing, armed, keep);
    }

    /// Reclaims the flow on both paths although the kernel has not released it. Only valid if no redirect can happen
    /// any more: the arming was refused, the endpoint has closed, or the connection is being aborted.
    pub fn disarm(&self) {
        self.ingress().disarm();
        self.local().disarm();
    }

    /// Bytes passed to user space since the connection was made.
    pub fn passed(&self) -> u64 {
        self.passed_word().atomic().load(Acquire)
    }

    /// Whether the kernel passed bytes that cannot be trusted; the connection must then be aborted.
    pub fn is_astray(&self) -> bool {
        self.astray().get() != 0
    }

    /// Cookie of the endpoint's own socket, if that is on this machine and has been recognised.
    pub fn peer(&self) -> Option<u64> {
        Some(self.peer_word().atomic().load(Acquire)).filter(|&cookie| cookie != 0)
    }

    /// Announces that the next response goes to the client with this key. The kernel looks up its socket when the
    /// response arrives.
    pub fn announce(&self, target: u64) {
        self.local().target().set(target);
    }

    /// Whether the kernel has found the announced client.
    pub fn has_found(&self, target: u64) -> bool {
        self.found().atomic().load(Acquire) == target
    }
}

/// One span, for its owner; the rules are those of [`SlotRef`].
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

    /// Starts a message by resetting its stamps. Only while released.
    pub fn begin_message(&self) {
        debug_assert!(self.is_released());
        self.first_ns().set(0);
        self.last_ns().set(0);
    }

    fn arm(&self, target: u64, framing: Framing, armed: u64, keep: bool) {
        let span = self.span.as_ptr();
        // SAFETY: released, so the kernel does not access these fields.
        unsafe {
            (&raw mut (*span).framing).write_volatile(framing);
            (&raw mut (*span).stop).write_volatile(0);
            (&raw mut (*span).keep).write_volatile(u32::from(keep));
        }
        self.target().set(target);
        self.armed().atomic().store(armed, SeqCst);
    }

    /// Whether the kernel has released the span, so that what it wrote may be read.
    pub fn is_released(&self) -> bool {
        self.armed().atomic().load(Acquire) == 0
    }

    /// Like [`SlotRef::disarm`], for this path.
    pub fn disarm(&self) {
        self.armed().atomic().store(0, SeqCst);
    }

    /// The position in the message. Only while released.
    pub fn framing(&self) -> Framing {
        debug_assert!(self.is_released());
        // SAFETY: released, so the kernel does not write it.
        unsafe { (&raw const (*self.span.as_ptr()).framing).read_volatile() }
    }

    /// Why the kernel stopped, one of `penstock_common::slot::stop`. Only while released.
    pub fn stop(&self) -> u32 {
        // SAFETY: an aligned word, read as a whole.
        unsafe { (&raw const (*self.span.as_ptr()).stop).read_volatile() }
    }

    /// Bytes redirected since the connection was made; may grow while armed.
    pub fn redirected(&self) -> u64 {
        self.redir().atomic().load(Acquire)
    }

    /// Segments or messages redirected since the connection was made.
    pub fn segments(&self) -> u64 {
        // SAFETY: an aligned word, read as a whole.
        unsafe { (&raw const (*self.span.as_ptr()).segments).read_volatile() }
    }

    /// Times of the message's first and last redirect, CLOCK_MONOTONIC in ns; 0 if there was none.
    pub fn stamps(&self) -> (u64, u64) {
        (self.first_ns().atomic().load(Relaxed), self.last_ns().atomic().load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use crate::kernel::Kernel;

    #[test]
    fn retired_slot_is_freed_only_after_running_programs_ended() {
        let kernel = Kernel::load(1).expect("load");
        let slots = kernel.slots();
        let in_use = || (slots.in_use().all, slots.in_use().retired);
        assert_eq!(in_use(), (0, 0));
        let index = slots.take().expect("a slot");
        assert_eq!(in_use(), (1, 0));
        slots.retire(index);
        slots.reclaim_after(|| Err(io::ErrorKind::InvalidInput.into()));
        assert_eq!((slots.take(), in_use()), (None, (1, 1)), "freed although the wait failed");
        slots.reclaim();
        assert_eq!(in_use(), (0, 0));
        assert_eq!(slots.take(), Some(index));
    }
}
