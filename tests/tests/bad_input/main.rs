//! Invalid and unusual input from clients and endpoints. Every fault gets its status and code, none of it reaches the other
//! side, and other connections are unaffected.

mod bodies;
mod endpoints;
mod formats;
mod heads;
mod interim;
mod refused_heads;
mod setting;
mod smuggling;
mod timeouts;
mod unusual;
