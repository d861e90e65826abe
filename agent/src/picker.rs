//! Picking the endpoint: the ext_proc exchange with an EPP, and the picker that is built in.
pub mod builtin;
pub mod client;
pub mod exchange;
pub mod mutation;
