//! Flags and environment on top of the file: what differs from one node to the next, and nothing else.

use std::net::SocketAddr;

use super::SteeringMode;

/// Flattened into the command line; a flag wins over its variable, a variable over the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Overrides {
    /// Address to listen on, instead of `listen.address`
    #[arg(long, env = "PENSTOCK_LISTEN", value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address of the admin server, instead of `admin.address`
    #[arg(long, env = "PENSTOCK_ADMIN", value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Steering mode, instead of `steering.mode`
    #[arg(long, env = "PENSTOCK_STEERING", value_name = "MODE")]
    pub steering: Option<SteeringMode>,
}
