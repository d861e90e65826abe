//! For both objects: ordered accesses to words of a map, lengths that the verifier understands, and the rings of last bytes.

#![no_std]
#![allow(unsafe_code)] // inline assembly
#![feature(asm_experimental_arch)]

pub mod ring;

use core::arch::asm;

use penstock_common::slot::Word;

#[inline(always)]
pub fn fetch_add(word: *mut u64, n: u64) -> u64 {
    let mut value = n;
    // SAFETY: the pointer is to a word of a map's value; the verifier checks it.
    unsafe { asm!("{0} = atomic_fetch_add((u64 *)({1} + 0), {0})", inout(reg) value, in(reg) word) };
    value
}

/// A fetch-and-add of 0: eBPF has no load-acquire on the supported kernels, and read-modify-writes that return the old value are
/// fully ordered (Documentation/bpf/standardization/instruction-set.rst, JITs of x86-64 and arm64).
#[inline(always)]
pub fn load_acquire(word: &Word) -> u64 {
    fetch_add(word.as_ptr(), 0)
}

#[inline(always)]
pub fn store_release(word: &Word, value: u64) {
    // SAFETY: exchanges the word behind a valid reference.
    unsafe { asm!("{0} = xchg_64({1} + 0, {0})", inout(reg) value => _, in(reg) word.as_ptr()) };
}

/// Stores `new` if the word is `old`. Returns whether it was.
#[inline(always)]
pub fn compare_exchange(word: &Word, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: exchanges the word behind a valid reference.
    unsafe {
        asm!("r0 = cmpxchg_64({0} + 0, r0, {1})", in(reg) word.as_ptr(), in(reg) new, inout("r0") old => found);
    }
    found == old
}

/// The same length if it is from 1 to `most`, in a form that the verifier understands; otherwise `None`. Before 6.8 the verifier
/// learns nothing from a comparison with 0, so the lower bound comes from an addition.
#[inline(always)]
pub fn bounded(len: u32, most: u32) -> Option<u32> {
    let mut less = u64::from(len);
    // SAFETY: subtracts 1 in a way that the compiler cannot see, so it can neither omit the comparison nor replace the sum by the
    // length.
    unsafe { asm!("{0} += -1", inout(reg) less) };
    if less < u64::from(most) { Some(less as u32 + 1) } else { None }
}
