//! The kernel programs' object files, built by `cargo xtask build-ebpf` and embedded in the binary.

/// The ELF reader needs aligned input.
#[cfg(any(penstock_bpf, penstock_wire_bpf))]
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

/// The object file, or `None` if it was missing when the binary was built (build.rs warns then).
pub(super) fn bytes() -> Option<&'static [u8]> {
    #[cfg(penstock_bpf)]
    {
        static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("PENSTOCK_BPF_OBJECT_PATH")));
        Some(&OBJECT.0)
    }
    #[cfg(not(penstock_bpf))]
    None
}

/// The object file of path `wire`.
pub(super) fn wire_bytes() -> Option<&'static [u8]> {
    #[cfg(penstock_wire_bpf)]
    {
        static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("PENSTOCK_WIRE_BPF_OBJECT_PATH")));
        Some(&OBJECT.0)
    }
    #[cfg(not(penstock_wire_bpf))]
    None
}
