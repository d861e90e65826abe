//! Picking the endpoint: the ext_proc exchange with an EPP, and the picker that is built in.
//!
//! In the order a request meets them: `replica` has the replicas of an EPP, `attempts` says which of them to ask, `client` has
//! the channels to them and a stream per request; `exchange` is what is said on such a stream; `mutation` applies the headers
//! that came back; `builtin` picks in this process. `tend` looks after the replicas meanwhile.
pub mod attempts;
pub mod builtin;
pub mod client;
pub mod connection;
pub mod echo;
pub mod error;
pub mod exchange;
mod health;
pub mod message;
pub mod mutation;
pub mod names;
pub mod replacement;
pub mod replica;
pub mod silence;
pub mod tend;
pub mod tls;
