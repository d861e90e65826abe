//! Picks endpoints, through an EPP (ext_proc) or with the built-in picker.
//!
//! `replica` holds an EPP's replicas, `tend` keeps them up to date and `reach` connects again to those that were lost; `attempts`
//! selects the replica to ask; `client` has the connections, which `keep` keeps open, and one stream per request (`grpc`); `exchange` is
//! the protocol on a stream; `mutation` applies the returned headers, `returned` says what
//! goes out of a response's body, `metadata` collects what the EPP says for the log; `builtin` picks
//! in this process.

pub mod address;
mod allowance;
pub mod attempts;
pub mod builtin;
pub mod client;
pub mod connection;
pub mod echo;
pub mod error;
pub mod exchange;
mod gathered;
mod grpc;
pub mod handshake;
mod health;
mod immediate;
pub mod keep;
pub mod message;
pub mod metadata;
pub mod mutation;
pub mod names;
mod reach;
pub mod replacement;
pub mod replica;
pub mod returned;
pub mod silence;
pub mod tend;
pub mod trial;
pub mod waiting_room;
