//! The wire protocol of endpoint pickers: the part of Envoy's `ext_proc` v3 that they use, and gRPC health checking.
//!
//! Given the `.proto` files of this crate, it has their messages, clients and servers. Message names, field numbers and the
//! gRPC paths are those of the originals, which `tests/wire.rs` holds against a binding of Envoy's own files. A field that is
//! not declared here is skipped on reading, as protobuf has it.

/// The generated modules, nested as their packages are.
#[allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
pub mod packages {
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

pub use packages::envoy::config::core::v3 as core;
pub use packages::envoy::service::ext_proc::v3 as ext_proc;
pub use packages::envoy::r#type::v3 as http_type;
pub use packages::grpc::health::v1 as health;
pub use prost_types;
