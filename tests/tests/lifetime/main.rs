//! The agent's lifetime: what it finds at start, reloads, and its end.

mod admin_port;
mod capabilities;
mod connections;
mod disk;
mod doctor;
mod killed;
mod leaving;
mod log;
mod panics;
mod picker_process;
mod reload;
mod reload_connections;
mod reload_listening;
mod reload_waiting;
mod upgrade;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

const MODELS: &str = "/v1/models";
const SOON: Duration = Duration::from_secs(10);
const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
