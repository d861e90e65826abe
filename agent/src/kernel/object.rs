//! The kernel program's object file, built by `cargo xtask build-ebpf` and carried in the binary.

/// `None`: the binary was built while the object was missing (build.rs has said so then).
pub(super) fn bytes() -> Option<&'static [u8]> {
    #[cfg(penstock_bpf)]
    {
        /// The ELF reader wants its input aligned.
        #[repr(C, align(32))]
        struct Aligned<T: ?Sized>(T);
        static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("PENSTOCK_BPF_OBJECT_PATH")));
        Some(&OBJECT.0)
    }
    #[cfg(not(penstock_bpf))]
    None
}
