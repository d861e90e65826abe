//! Picking the endpoint: the ext_proc exchange with an EPP, and the picker that is built in.
//!
//! In the order a request meets them: `client` has the channel to the EPP and a stream per request; `exchange` is what is
//! said on such a stream; `mutation` applies the headers that came back; `builtin` picks in this process.
pub mod builtin;
pub mod client;
pub mod connection;
pub mod error;
pub mod exchange;
pub mod message;
pub mod mutation;
pub mod replacement;
pub mod silence;
pub mod tls;
