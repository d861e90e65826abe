//! Socket activation: the listening sockets that a service manager such as systemd has opened (`sd_listen_fds(3)`).

use std::{collections::HashMap, env, net::SocketAddr, os::fd::OwnedFd};

use anyhow::{Context as _, Result, ensure};

use super::{Passed, Role};
use crate::{config::Config, kernel::descriptors, takeover::message::SOCKETS};

/// The number of the first descriptor.
const FIRST: i32 = 3;

/// Descriptors with their names.
#[derive(Debug, Default)]
pub struct Activated(Vec<(String, OwnedFd)>);

impl Activated {
    /// Takes the descriptors that are meant for this process. Must be called once, before this process opens any.
    pub fn take() -> Result<Self> {
        let get = |name: &str| env::var(name).ok();
        let names = names(get("LISTEN_PID"), get("LISTEN_FDS"), get("LISTEN_FDNAMES"), std::process::id())?;
        let fds =
            descriptors::inherited(FIRST, names.len()).context("LISTEN_FDS names a descriptor that is not open")?;
        Ok(Self(names.into_iter().zip(fds).collect()))
    }

    /// The sockets for the agent with this configuration.
    pub fn sockets(self, config: &Config) -> Result<Vec<Passed>> {
        let tls = config.listen.tls.as_ref().map(|tls| tls.address);
        let configured = [(Role::Listen, Some(config.listen.address)), (Role::Tls, tls)];
        let configured = configured.into_iter().chain([(Role::Admin, Some(config.admin.address))]);
        let configured: HashMap<_, _> = configured.filter_map(|(role, address)| Some((role, address?))).collect();
        let passed = self.0.into_iter().map(|(name, fd)| {
            let socket = descriptors::listener(fd).map_err(|what| anyhow::anyhow!("{what}"));
            let socket = socket.with_context(|| format!("descriptor {name:?} of socket activation"))?;
            let address = socket.local_addr()?;
            let role = role(&name, address, &configured)
                .with_context(|| format!("descriptor {name:?} of socket activation, {address}"))?;
            Ok(Passed { role, held: true, socket })
        });
        passed.collect()
    }
}

/// The names of the descriptors that are meant for the process `own`.
fn names(pid: Option<String>, count: Option<String>, names: Option<String>, own: u32) -> Result<Vec<String>> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(Vec::new()) };
    // Meant for a process that started this one.
    if pid.parse() != Ok(own) {
        return Ok(Vec::new());
    }
    let count: usize = count
        .parse()
        .ok()
        .filter(|count| *count <= SOCKETS)
        .with_context(|| format!("LISTEN_FDS is {count:?}, expected a number of at most {SOCKETS}"))?;
    let mut names: Vec<String> = names
        .filter(|names| !names.is_empty())
        .map_or_else(Vec::new, |names| names.split(':').map(str::to_owned).collect());
    ensure!(names.len() <= count, "LISTEN_FDNAMES has {} names, LISTEN_FDS {count}", names.len());
    names.resize(count, String::new());
    Ok(names)
}

/// What a socket is for: as its name says, or as the configuration says for its address.
fn role(name: &str, address: SocketAddr, configured: &HashMap<Role, SocketAddr>) -> Result<Role> {
    if let Some(role) = Role::named(name) {
        ensure!(configured.contains_key(&role), "the configuration has no [listen.tls]");
        return Ok(role);
    }
    let found = configured.iter().find(|&(_, &one)| one == address).map(|(&role, _)| role);
    found.context("no listener: name it listen, tls or admin (FileDescriptorName=), or configure this address")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn only_descriptors_for_this_process_are_taken() {
        let none: Vec<String> = Vec::new();
        assert_eq!(names(None, some("2"), None, 7).unwrap(), none);
        assert_eq!(names(some("8"), some("2"), None, 7).unwrap(), none);
        assert_eq!(names(some("x"), some("2"), None, 7).unwrap(), none);
        assert_eq!(names(some("7"), None, None, 7).unwrap(), none);
        assert_eq!(names(some("7"), some("2"), None, 7).unwrap(), ["", ""]);
        assert_eq!(names(some("7"), some("3"), some("tls:listen"), 7).unwrap(), ["tls", "listen", ""]);
        for (count, given) in [("x", None), ("-1", None), ("5000", None), ("1", some("a:b"))] {
            assert!(names(some("7"), some(count), given, 7).is_err(), "{count}");
        }
    }

    #[test]
    fn name_decides_what_a_socket_is_for_and_then_its_address() {
        let [listen, admin, other]: [SocketAddr; 3] = [1, 2, 3].map(|port| ([127, 0, 0, 1], port).into());
        let configured = HashMap::from([(Role::Listen, listen), (Role::Admin, admin)]);
        let role = |name, address| role(name, address, &configured).map_err(|error| error.to_string());
        assert_eq!(role("admin", other), Ok(Role::Admin));
        assert_eq!(role("listen", admin), Ok(Role::Listen));
        assert_eq!(role("penstock.socket", admin), Ok(Role::Admin));
        assert_eq!(role("", listen), Ok(Role::Listen));
        assert!(role("tls", other).unwrap_err().contains("[listen.tls]"));
        assert!(role("penstock.socket", other).unwrap_err().contains("FileDescriptorName"));
    }
}
