//! Tells a service manager such as systemd how the agent is (`sd_notify(3)`), if it started the agent with `NOTIFY_SOCKET`.

use std::{
    env,
    ffi::OsString,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use crate::kernel::socket::monotonic_ns;

/// Sends states. Does nothing without a service manager.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often the service manager expects a sign of life at least.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// For the service manager that the environment names.
    pub fn from_env() -> Self {
        let Some(address) = env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let get = |name| env::var(name).ok();
        let watchdog = watchdog(get("WATCHDOG_USEC"), get("WATCHDOG_PID"), std::process::id());
        Self::to(&address, watchdog).unwrap_or_else(|error| {
            tracing::warn!(?address, %error, "cannot notify the service manager: NOTIFY_SOCKET");
            Self::default()
        })
    }

    fn to(address: &OsString, watchdog: Option<Duration>) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(address)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a path or @ with a name")),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Some((socket, address)), watchdog })
    }

    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The agent is ready, or has reloaded its configuration.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=ready");
    }

    /// What the agent waits for.
    pub fn waiting(&self, pending: &[String]) {
        self.send(&format!("STATUS=waiting for: {}", pending.join(", ").replace('\n', " ")));
    }

    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_ns() / 1000));
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=draining");
    }

    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// Another process of this service, or of another one, serves from now on. Sends nothing afterwards in the first case.
    pub fn handed_over(&mut self, pid: Option<i32>) {
        let status = "handed over, finishing responses";
        match pid.filter(|&pid| is_of_this_service(pid)) {
            Some(pid) => {
                self.send(&format!("MAINPID={pid}\nSTATUS={status}"));
                self.socket = None;
            }
            None => self.send(&format!("STATUS={status}")),
        }
    }

    fn send(&self, state: &str) {
        let Some((socket, address)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::debug!(%error, state, "cannot notify the service manager");
        }
    }
}

/// The interval of the watchdog, if it is meant for the process `own`.
fn watchdog(interval: Option<String>, pid: Option<String>, own: u32) -> Option<Duration> {
    if pid.is_some_and(|pid| pid.parse() != Ok(own)) {
        return None;
    }
    interval?.parse().ok().filter(|interval| *interval > 0).map(Duration::from_micros)
}

/// Whether the process is in the control group of this one, which a service manager makes for each service.
fn is_of_this_service(pid: i32) -> bool {
    let group = |pid: &str| std::fs::read(format!("/proc/{pid}/cgroup")).ok();
    group("self").is_some_and(|own| group(&pid.to_string()) == Some(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives at a service manager.
    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 512];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    fn is_told(manager: &UnixDatagram, address: &str) {
        manager.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut notifier = Notifier::to(&address.into(), None).unwrap();
        notifier.waiting(&["EPP of pool a".to_owned(), "worker 0".to_owned()]);
        assert_eq!(received(manager), "STATUS=waiting for: EPP of pool a, worker 0");
        notifier.ready();
        assert_eq!(received(manager), "READY=1\nSTATUS=ready");
        let before = monotonic_ns() / 1000;
        notifier.reloading();
        let told = received(manager);
        let time: u64 = told.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!(time >= before && time <= monotonic_ns() / 1000);
        notifier.alive();
        assert_eq!(received(manager), "WATCHDOG=1");
        notifier.stopping();
        assert!(received(manager).starts_with("STOPPING=1\n"));
        notifier.handed_over(None);
        assert_eq!(received(manager), "STATUS=handed over, finishing responses");
        let own = std::process::id().cast_signed();
        notifier.handed_over(Some(own));
        assert_eq!(received(manager), format!("MAINPID={own}\nSTATUS=handed over, finishing responses"));
        notifier.ready();
        manager.set_nonblocking(true).unwrap();
        assert!(manager.recv(&mut [0; 16]).is_err(), "the service has another main process");
    }

    #[test]
    fn states_arrive_at_a_path_and_at_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        is_told(&UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap());
        let name = format!("penstock-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        is_told(&UnixDatagram::bind_addr(&address).unwrap(), &format!("@{name}"));
    }

    #[test]
    fn missing_or_strange_service_manager_is_ignored() {
        Notifier::default().ready();
        let folder = tempfile::tempdir().unwrap();
        Notifier::to(&folder.path().join("nobody").into(), None).unwrap().ready();
        for strange in ["", "notify", "vsock:2:1"] {
            assert!(Notifier::to(&strange.into(), None).is_err(), "{strange}");
        }
    }

    #[test]
    fn watchdog_is_for_the_process_that_it_names() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(watchdog(some("5000000"), None, 7), Some(Duration::from_secs(5)));
        assert_eq!(watchdog(some("5000000"), some("7"), 7), Some(Duration::from_secs(5)));
        assert_eq!(watchdog(some("5000000"), some("8"), 7), None);
        for interval in [None, some("0"), some("x")] {
            assert_eq!(watchdog(interval, None, 7), None);
        }
    }
}
