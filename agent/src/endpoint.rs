//! The model servers of a pool: which there are and how they are, and the connections to them: dialling, keeping, reading.

pub mod body;
pub mod budget;
mod check;
pub mod connection;
pub mod discovery;
mod feed;
mod file;
mod health;
pub mod http2;
pub mod in_flight;
pub mod local_fault;
pub mod member;
mod names;
pub mod pool;
pub mod sending;
pub mod set;
mod subset;
pub mod times;
mod wire;
