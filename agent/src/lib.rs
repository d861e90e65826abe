//! Penstock: routes each inference request to the endpoint its picker chooses, then lets the kernel carry the response.
//!
//! Modules are listed in the order in which a request passes through them; a module never imports from its callers.

pub mod pem;
pub mod listeners;
pub mod config;
pub mod capability;
pub mod text;
pub mod deadline;
pub mod logging;
pub mod readiness;
pub mod probe;
pub mod panics;
pub mod metrics;
pub mod budget;
pub mod reserve;
pub mod dns;
pub mod admin;
pub mod http;
pub mod telemetry;
pub mod bbr;
pub mod route;
pub mod picker;
pub mod kernel;
pub mod tee;
pub mod rename;
pub mod steer;
pub mod client;
pub mod endpoint;
pub mod deliver;
pub mod selftest;
pub mod ladder;
pub mod error;
pub mod shared;
pub mod room;
pub mod worker;
pub mod upload;
pub mod proxy;
pub mod turns;
pub mod tls;
pub mod connection;
pub mod server;
pub mod reload;
pub mod control;
pub mod app;
pub mod run;
pub mod epp_server;
