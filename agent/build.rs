fn main() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/penstock.bpf.o");
    println!("cargo:rustc-check-cfg=cfg(penstock_bpf)");
    println!("cargo:rerun-if-changed={}", path.display());
    if path.exists() {
        println!("cargo:rustc-cfg=penstock_bpf");
        println!("cargo:rustc-env=PENSTOCK_BPF_OBJECT_PATH={}", path.display());
    }
}
