//! Connections to model servers: dialling, keeping, and reading them.

pub mod connection;
pub mod pool;
