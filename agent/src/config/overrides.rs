//! Command-line flags and environment variables that override the file: only settings that differ between nodes, or
//! with how the agent is started.

use std::{net::SocketAddr, path::PathBuf};

use super::{Config, SteeringMode};

/// Flattened into the command line. A flag overrides its environment variable, which overrides the file.
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
    /// Steer also on a kernel that is known to lose or repeat bytes in sockmap, as `steering.force`
    #[arg(long, env = "PENSTOCK_FORCE", value_parser = clap::builder::BoolishValueParser::new())]
    pub force: bool,
    /// Name of the node this agent runs on, instead of `node.name`
    #[arg(long, env = "PENSTOCK_NODE", value_name = "NAME")]
    pub node: Option<String>,
    /// Zone this agent runs in, instead of `node.zone`
    #[arg(long, env = "PENSTOCK_ZONE", value_name = "NAME")]
    pub zone: Option<String>,
    /// Unix socket at which agents take over from each other, instead of `process.upgrade_socket`
    #[arg(long, env = "PENSTOCK_UPGRADE_SOCKET", value_name = "PATH")]
    pub upgrade_socket: Option<PathBuf>,
}

impl Overrides {
    pub(super) fn apply(&self, config: &mut Config) {
        config.listen.address = self.listen.unwrap_or(config.listen.address);
        config.admin.address = self.admin.unwrap_or(config.admin.address);
        config.steering.mode = self.steering.unwrap_or(config.steering.mode);
        config.steering.force |= self.force;
        config.node.name = given(&self.node).or(config.node.name.take());
        config.node.zone = given(&self.zone).or(config.node.zone.take());
        config.process.upgrade_socket = self.upgrade_socket.clone().or(config.process.upgrade_socket.take());
    }
}

/// Kubernetes gives a variable the value of a label that the Pod lacks as an empty string.
fn given(name: &Option<String>) -> Option<String> {
    name.clone().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};

    use super::*;

    fn command() -> Command {
        Overrides::augment_args(Command::new("penstock"))
    }

    #[test]
    fn flags_set_overrides() {
        let line = ["penstock", "--listen", "[::1]:1", "--steering", "ingress", "--force"];
        let overrides = Overrides::from_arg_matches(&command().get_matches_from(line)).unwrap();
        assert_eq!(overrides.listen, Some("[::1]:1".parse().unwrap()));
        assert_eq!(overrides.steering, Some(SteeringMode::Ingress));
        assert!(overrides.force);
        assert!(command().try_get_matches_from(["penstock", "--steering", "on"]).is_err());
    }

    #[test]
    fn empty_name_leaves_the_setting() {
        let mut config = Config::default();
        config.node.zone = Some("a".to_owned());
        let overrides = Overrides { zone: Some(String::new()), node: Some("n".to_owned()), ..Overrides::default() };
        overrides.apply(&mut config);
        assert_eq!((config.node.name.as_deref(), config.node.zone.as_deref()), (Some("n"), Some("a")));
    }

    #[test]
    fn each_flag_has_its_environment_variable() {
        let command = command();
        let variables: Vec<_> = command.get_arguments().filter_map(|arg| arg.get_env()?.to_str()).collect();
        assert_eq!(
            variables,
            [
                "PENSTOCK_LISTEN",
                "PENSTOCK_ADMIN",
                "PENSTOCK_STEERING",
                "PENSTOCK_FORCE",
                "PENSTOCK_NODE",
                "PENSTOCK_ZONE",
                "PENSTOCK_UPGRADE_SOCKET"
            ]
        );
    }
}
