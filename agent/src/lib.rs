//! Penstock: routes each inference request to the endpoint its picker names, then lets the kernel carry the answer.
//!
//! Modules stand in the order in which a request meets them; a module never imports from one that calls it.

pub mod admin;
pub mod bbr;
pub mod config;
pub mod endpoint;
pub mod epp_server;
pub mod http;
pub mod kernel;
pub mod metrics;
pub mod picker;
pub mod route;
pub mod steer;
