//! The endpoints of a pool: discovery, health, and the connections to them.

pub mod body;
pub mod budget;
mod check;
pub mod connection;
mod crossing;
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
mod seen;
pub mod sending;
pub mod set;
pub mod single;
mod subset;
pub mod timeouts;
pub mod tls;
mod wire;
mod written;
