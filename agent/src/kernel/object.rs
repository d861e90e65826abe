//! The kernel programs' object file, built by `cargo xtask build-ebpf` and embedded in the binary.

/// The object file, or `None` if it was missing when the binary was built (build.rs warns then).
pub(super) fn bytes() -> Option<&'static [u8]> {
    #[cfg(penstock_bpf)]
    {
        /// The ELF reader needs aligned input.
        #[repr(C, align(32))]
        struct Aligned<T: ?Sized>(T);
        static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("PENSTOCK_BPF_OBJECT_PATH")));
        Some(&OBJECT.0)
    }
    #[cfg(not(penstock_bpf))]
    None
}
