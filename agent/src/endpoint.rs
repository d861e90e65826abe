//! The model servers of a pool: which there are and how they are, and the connections to them: dialling, keeping, reading.

pub mod budget;
pub mod connection;
mod health;
pub mod in_flight;
pub mod member;
pub mod pool;
pub mod set;
mod subset;
