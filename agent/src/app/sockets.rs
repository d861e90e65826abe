//! The agent's listening sockets: inherited ones, and others that are bound before anything else can fail. They listen when the agent
//! begins to accept.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use anyhow::{Context as _, Result, ensure};
use tokio::sync::watch;

use crate::{
    config::Listen,
    kernel::socket,
    listeners::Listeners,
    server::{Listener, Stop},
    takeover::{Inherited, Lent, Loan, Passed, Role},
    tls::Acceptor,
};

/// Accept backlog of each listener, in connections.
const BACKLOG: i32 = 4096;

/// The sockets for clients.
pub(super) struct Sockets {
    plain: ListenGroup,
    secured: Option<ListenGroup>,
    /// To the agent after this one.
    lent: Lent,
}

/// The sockets of one address: one per worker, or those that were inherited.
struct ListenGroup {
    role: Role,
    address: SocketAddr,
    /// The service manager has them too: connections in their queues are left to the next agent.
    held: bool,
    sockets: Vec<TcpListener>,
    acceptor: Option<Acceptor>,
    stop: watch::Sender<Stop>,
}

impl Sockets {
    /// Takes the inherited sockets for `count` workers, and binds those that are missing.
    pub(super) fn open(listen: &Listen, count: usize, inherited: &mut Inherited) -> Result<Self> {
        let mut open = |role, address| {
            let passed = inherited.take(role, address);
            ListenGroup::open(role, address, count, passed).with_context(|| format!("cannot listen on {address}"))
        };
        let plain = open(Role::Listen, listen.address)?;
        let secured = listen.tls.as_ref().map(|tls| open(Role::Tls, tls.address)).transpose()?;
        Ok(Self { plain, secured, lent: Lent::default() })
    }

    /// The addresses of the agent, with the ports that were bound.
    pub(super) fn own(&self, admin: &TcpListener) -> io::Result<Listeners> {
        Ok(Listeners::new([self.address(), admin.local_addr()?].into_iter().chain(self.tls_address())))
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.plain.address
    }

    pub(super) fn tls_address(&self) -> Option<SocketAddr> {
        self.secured.as_ref().map(|secured| secured.address)
    }

    /// Sets the send buffer that accepted connections inherit, so that workers do not need a capability to set it.
    pub(super) fn set_send_buffer(&self, bytes: u32) -> io::Result<()> {
        self.plain.sockets.iter().try_for_each(|listener| socket::set_send_buffer(listener, bytes))
    }

    /// Lets accepted connections inherit the account of their bytes. If such a connection comes from another agent on this machine,
    /// that agent knows from the start that its endpoint is an agent.
    pub(super) fn keep_account(&self) -> io::Result<()> {
        self.plain.sockets.iter().try_for_each(socket::keep_account)
    }

    /// Sets what makes the TLS listener's connections TLS.
    pub(super) fn secure(&mut self, acceptor: Acceptor) {
        if let Some(secured) = &mut self.secured {
            secured.acceptor = Some(acceptor);
        }
    }

    /// Begins to listen, and returns the sockets of each of `count` workers.
    pub(super) fn listen(&self, count: usize) -> io::Result<Vec<Vec<Listener>>> {
        let mut listeners: Vec<Vec<_>> = (0..count).map(|_| Vec::new()).collect();
        for group in self.groups() {
            for socket in &group.sockets {
                socket2::SockRef::from(socket).listen(BACKLOG)?;
            }
            for (worker, sockets) in listeners.iter_mut().zip(shares(group.sockets.len(), count)) {
                for index in sockets {
                    let socket = group.sockets[index].try_clone()?;
                    worker.push(Listener { socket, tls: group.acceptor.clone(), stop: group.stop.subscribe() });
                }
            }
        }
        Ok(listeners)
    }

    /// Duplicates for another process, which has them as long as the loan lasts.
    pub(super) fn passed(&self) -> io::Result<(Vec<Passed>, Loan)> {
        let group = |group: &ListenGroup| {
            let passed = |socket: &TcpListener| Passed::duplicate(group.role, group.held, socket);
            group.sockets.iter().map(passed).collect::<Vec<_>>()
        };
        let passed = self.groups().flat_map(group).collect::<io::Result<_>>()?;
        Ok((passed, self.lent.lend()))
    }

    /// Leaves the sockets of `roles` to another process: stops accepting at once, and closes this process's descriptors.
    pub(super) fn release(&mut self, roles: &[Role]) {
        for group in self.groups_mut().filter(|group| roles.contains(&group.role)) {
            group.stop.send_replace(Stop::Released);
            group.sockets.clear();
        }
    }

    /// Closes this process's descriptors: of sockets that another process has, too, at once, of others when the workers have accepted
    /// what waits in the queues.
    pub(super) fn close(&mut self) {
        let is_lent = self.lent.is_lent();
        for group in self.groups_mut() {
            let stop = if group.held || is_lent { Stop::Released } else { Stop::Closed };
            group.stop.send_if_modified(|before| *before == Stop::No && std::mem::replace(before, stop) != stop);
            group.sockets.clear();
        }
    }

    fn groups(&self) -> impl Iterator<Item = &ListenGroup> {
        [&self.plain].into_iter().chain(&self.secured)
    }

    fn groups_mut(&mut self) -> impl Iterator<Item = &mut ListenGroup> {
        [&mut self.plain].into_iter().chain(&mut self.secured)
    }
}

impl ListenGroup {
    fn open(role: Role, address: SocketAddr, count: usize, passed: Vec<Passed>) -> io::Result<Self> {
        let held = passed.iter().any(|one| one.held);
        let mut sockets: Vec<TcpListener> = passed.into_iter().map(|one| one.socket).collect();
        sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        if let Some(first) = sockets.first() {
            let address = first.local_addr()?;
            // The queues of a service manager's sockets outlive the agent; those of further ones would not.
            let missing = if held { 0 } else { count.saturating_sub(sockets.len()) };
            match bind(address, missing) {
                Ok(more) => sockets.extend(more),
                // As if another user has opened those that were inherited.
                Err(error) => {
                    tracing::debug!(%address, %error, "cannot bind further sockets, workers share those inherited");
                }
            }
        } else {
            warn_if_shared(address);
            sockets = bind(address, count)?;
        }
        let address = sockets[0].local_addr()?;
        Ok(Self { role, address, held, sockets, acceptor: None, stop: watch::Sender::new(Stop::No) })
    }
}

/// Which of `sockets` sockets each of `count` workers accepts from. Every socket is accepted from. Each worker has as many of its own as
/// there are for all; all workers share the others, so that none gets twice as many connections as another.
fn shares(sockets: usize, count: usize) -> Vec<Vec<usize>> {
    if sockets < count {
        // The kernel does not choose among workers that share a socket: the first that wakes accepts.
        return (0..count).map(|worker| vec![worker % sockets.max(1)]).collect();
    }
    let own = sockets / count * count;
    (0..count).map(|worker| (worker..own).step_by(count).chain(own..sockets).collect()).collect()
}

/// The socket of the admin server: inherited, or bound.
pub(super) fn open_admin(address: SocketAddr, inherited: &mut Inherited) -> Result<(TcpListener, bool)> {
    let mut passed = inherited.take(Role::Admin, address).into_iter();
    let Some(first) = passed.next() else {
        let bound = TcpListener::bind(address);
        return bound
            .map(|bound| (bound, false))
            .with_context(|| format!("cannot start the admin server on {address}"));
    };
    ensure!(passed.next().is_none(), "cannot start the admin server on {address}: several sockets were passed for it");
    Ok((first.socket, first.held))
}

/// Binds `count` sockets to the same address (SO_REUSEPORT). They do not listen yet: a listening socket gets a share of the
/// connections, and resets them if the start fails afterwards.
fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    let mut listeners: Vec<TcpListener> = Vec::with_capacity(count);
    for _ in 0..count {
        // Port 0 is resolved by the first listener.
        let address = listeners.first().map_or(Ok(address), TcpListener::local_addr)?;
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        listeners.push(socket.into());
    }
    Ok(listeners)
}

/// Logs a warning if another process listens on the address.
fn warn_if_shared(address: SocketAddr) {
    let alone = || {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())
    };
    if address.port() != 0 && alone().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::AddrInUse) {
        tracing::warn!(%address, "another process listens on this address, too, and gets a share of the connections");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn every_socket_is_accepted_from_and_every_worker_accepts() {
        for sockets in 1..12 {
            for count in 1..12 {
                let shares = shares(sockets, count);
                assert_eq!(shares.len(), count);
                assert!(shares.iter().all(|share| !share.is_empty()), "{sockets} {count}: {shares:?}");
                assert!((0..sockets).all(|socket| shares.iter().any(|share| share.contains(&socket))));
                let own = |share: &Vec<usize>| {
                    share.iter().filter(|one| shares.iter().filter(|other| other.contains(one)).count() == 1).count()
                };
                if sockets >= count && count > 1 {
                    assert!(shares.iter().all(|share| own(share) == sockets / count), "{sockets} {count}: {shares:?}");
                }
            }
        }
    }

    #[test]
    fn inherited_sockets_are_kept_and_completed() {
        let passed = bind("127.0.0.1:0".parse().unwrap(), 2).unwrap();
        let address = passed[0].local_addr().unwrap();
        for (count, expected) in [(1, 2), (2, 2), (5, 5)] {
            let passed = passed.iter().map(|socket| Passed::duplicate(Role::Listen, false, socket).unwrap()).collect();
            let group = ListenGroup::open(Role::Listen, "127.0.0.1:0".parse().unwrap(), count, passed).unwrap();
            assert_eq!((group.sockets.len(), group.address), (expected, address));
        }
        // The service manager's get none beside them.
        let held = passed.iter().map(|socket| Passed::duplicate(Role::Listen, true, socket).unwrap()).collect();
        let group = ListenGroup::open(Role::Listen, "127.0.0.1:0".parse().unwrap(), 5, held).unwrap();
        assert_eq!((group.sockets.len(), group.address), (2, address));
        // A socket without SO_REUSEPORT, as a service manager may pass.
        let single = TcpListener::bind("127.0.0.1:0").unwrap();
        let passed = vec![Passed::duplicate(Role::Listen, true, &single).unwrap()];
        let group = ListenGroup::open(Role::Listen, "0.0.0.0:1".parse().unwrap(), 4, passed).unwrap();
        assert!(group.held && group.sockets.len() == 1 && group.address == single.local_addr().unwrap());
    }

    /// A socket that another process has, too, is closed without waiting for its queue, which is the other's.
    #[test]
    fn lent_sockets_are_released() {
        let mut listen = Config::new(Vec::new()).listen;
        listen.address = "127.0.0.1:0".parse().unwrap();
        let stopped = |lend: fn(Loan) -> Option<Loan>| {
            let mut sockets = Sockets::open(&listen, 1, &mut Inherited::default()).unwrap();
            let (_passed, loan) = sockets.passed().unwrap();
            let _loan = lend(loan);
            let stop = sockets.plain.stop.subscribe();
            sockets.close();
            *stop.borrow()
        };
        assert_eq!(stopped(Some), Stop::Released);
        assert_eq!(stopped(|_over| None), Stop::Closed);
        assert_eq!(
            stopped(|loan| {
                loan.keep();
                None
            }),
            Stop::Released
        );
    }
}
