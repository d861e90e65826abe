//! Takes the listening sockets over from the agent that runs before this one, and hands them to the next one; or gets them from the
//! service manager (socket activation).
//!
//! The new agent connects to `process.upgrade_socket` and gets every listening socket by SCM_RIGHTS. It accepts nothing until it is
//! ready. Then it begins to accept, says so, and the old one closes its descriptors and drains. The sockets themselves never close, so
//! no connection in an accept queue is lost. Whatever ends the new agent before it is ready changes nothing for the old one.

pub mod activation;
pub mod giving;
mod message;
pub mod taking;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

/// What a listening socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Clients.
    Listen,
    /// Clients that speak TLS.
    Tls,
    /// The admin server.
    Admin,
}

impl Role {
    const ALL: [Self; 3] = [Self::Listen, Self::Tls, Self::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Self::Listen => "listen",
            Self::Tls => "tls",
            Self::Admin => "admin",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A listening socket that another process has opened.
#[derive(Debug)]
pub struct Passed {
    pub role: Role,
    /// The service manager has it too, and keeps it open after the last agent.
    pub held: bool,
    pub socket: TcpListener,
}

impl Passed {
    /// A duplicate of a socket of this process.
    pub fn duplicate(role: Role, held: bool, socket: &TcpListener) -> io::Result<Self> {
        Ok(Self { role, held, socket: socket.try_clone()? })
    }

    fn is_at(&self, wanted: SocketAddr) -> bool {
        let fits = |own: SocketAddr| own.ip() == wanted.ip() && (wanted.port() == 0 || own.port() == wanted.port());
        self.socket.local_addr().is_ok_and(fits)
    }
}

/// Whether another process has this agent's sockets, too.
#[derive(Debug, Default)]
pub struct Lent(Arc<()>);

/// Another process has the sockets as long as it exists.
#[derive(Debug)]
pub struct Loan(Arc<()>);

impl Lent {
    pub fn lend(&self) -> Loan {
        Loan(Arc::clone(&self.0))
    }

    pub fn is_lent(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl Loan {
    /// The other process accepts from the sockets, and keeps them.
    pub fn keep(self) {
        std::mem::forget(self.0);
    }
}

/// Sockets that this agent uses instead of binding its own.
#[derive(Debug, Default)]
pub struct Inherited {
    /// From the agent before this one: used where the configuration names their address.
    pub taken: Vec<Passed>,
    /// From the service manager: used whatever the configuration says.
    pub activated: Vec<Passed>,
    used: Vec<Role>,
}

impl Inherited {
    pub fn new(taken: Vec<Passed>, activated: Vec<Passed>) -> Self {
        Self { taken, activated, used: Vec::new() }
    }

    /// What the sockets from the agent before this one are for that [`take`](Self::take) has returned.
    pub fn used(&self) -> Vec<Role> {
        self.used.clone()
    }

    /// The sockets for `role`, whose configured address is `address`. Empty if it has to be bound.
    pub fn take(&mut self, role: Role, address: SocketAddr) -> Vec<Passed> {
        let taken: Vec<_> = self.taken.extract_if(.., |one| one.role == role && one.is_at(address)).collect();
        let activated: Vec<_> = self.activated.extract_if(.., |one| one.role == role).collect();
        self.used.extend((!taken.is_empty()).then_some(role));
        // The agent before this one passes on what it has from the same service manager.
        let is_same = taken.iter().any(|one| one.held);
        taken.into_iter().chain(activated.into_iter().filter(|_| !is_same)).collect()
    }
}
