//! Compiles the `.proto` files under `proto/` to Rust, in-process: no `protoc` is needed to build.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(
        ["envoy/service/ext_proc/v3/external_processor.proto", "grpc/health/v1/health.proto"],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        // Bodies and header values are slices of what was received, not copies of it.
        .bytes(".")
        .include_file("packages.rs")
        .compile_fds(files)?;
    Ok(())
}
