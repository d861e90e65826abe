//! The agent's listening sockets: inherited ones, and others that are bound before anything else can fail. They listen when the agent
//! begins to accept.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Weak},
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
    /// The plain one first.
    groups: Vec<ListenGroup>,
    /// To the agent after this one.
    lent: Lent,
    /// See [`keep_account`](Self::keep_account).
    keeps_account: bool,
    /// Exists while a change is prepared that has further sockets.
    pending: Weak<()>,
}

/// The sockets of one address: one per worker, or those that were inherited.
struct ListenGroup {
    role: Role,
    /// As in the configuration.
    configured: SocketAddr,
    /// As bound.
    address: SocketAddr,
    /// The service manager has them too: connections in their queues are left to the next agent.
    held: bool,
    sockets: Vec<Arc<TcpListener>>,
    acceptor: Option<Acceptor>,
    /// For the listeners that the workers have.
    stop: watch::Sender<Stop>,
}

/// The sockets of another configuration: present ones, and others that are bound and do not listen.
pub(super) struct ListenChange {
    groups: Vec<ListenGroup>,
    pub workers: usize,
    /// Until this is dropped, no other process gets sockets: it would not get all of them.
    pending: Option<Arc<()>>,
}

impl ListenChange {
    /// Whether it has the present sockets alone.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_none()
    }
}

impl Sockets {
    /// Takes the inherited sockets for `count` workers, and binds those that are missing.
    pub(super) fn open(listen: &Listen, count: usize, inherited: &mut Inherited) -> Result<Self> {
        let mut open = |role, address| {
            let passed = inherited.take(role, address);
            if passed.is_empty() {
                warn_if_shared(address);
            }
            ListenGroup::open(role, address, count, passed).with_context(|| format!("cannot listen on {address}"))
        };
        let mut groups = vec![open(Role::Listen, listen.address)?];
        groups.extend(listen.tls.as_ref().map(|tls| open(Role::Tls, tls.address)).transpose()?);
        Ok(Self { groups, lent: Lent::default(), keeps_account: false, pending: Weak::new() })
    }

    /// The addresses of the agent, with the ports that were bound.
    pub(super) fn own(&self, admin: &TcpListener) -> io::Result<Listeners> {
        Ok(own(&self.groups, admin.local_addr()?))
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.plain().address
    }

    pub(super) fn tls_address(&self) -> Option<SocketAddr> {
        self.groups.iter().find(|group| group.role == Role::Tls).map(|group| group.address)
    }

    /// Sets the send buffer that accepted connections inherit, so that workers do not need a capability to set it.
    pub(super) fn set_send_buffer(&self, bytes: u32) -> io::Result<()> {
        self.plain().sockets.iter().try_for_each(|listener| socket::set_send_buffer(listener, bytes))
    }

    /// Lets accepted connections inherit the account of their bytes. If such a connection comes from another agent on this machine,
    /// that agent knows from the start that its endpoint is an agent.
    pub(super) fn keep_account(&mut self) -> io::Result<()> {
        self.keeps_account = true;
        self.plain().keep_account()
    }

    /// Sets what makes the TLS listener's connections TLS.
    pub(super) fn secure(&mut self, acceptor: Acceptor) {
        if let Some(secured) = self.groups.iter_mut().find(|group| group.role == Role::Tls) {
            secured.acceptor = Some(acceptor);
        }
    }

    /// Begins to listen, and returns the sockets of each of `count` workers.
    pub(super) fn listen(&self, count: usize) -> io::Result<Vec<Vec<Listener>>> {
        listen(&self.groups, count)
    }

    /// Binds what another configuration needs besides. `may_bind`: sockets bound now are as good as those bound at the start.
    pub(super) fn prepare(&mut self, listen: &Listen, workers: usize, may_bind: bool) -> Result<ListenChange> {
        let mut is_more = false;
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let address = match (group.role, &listen.tls) {
                (Role::Tls, Some(tls)) => tls.address,
                _ => listen.address,
            };
            let next = if address == group.configured || group.held {
                // What another process gets must be complete.
                let may_add = may_bind && !group.held && !self.lent.is_lent();
                group.with(if may_add { workers } else { 0 })
            } else {
                self.elsewhere(group, address, workers, may_bind)
                    .with_context(|| format!("cannot listen on {address}"))?
            };
            if group.held && address != group.configured {
                let used = group.address;
                tracing::warn!(%address, %used, "cannot listen on another address than the service manager's socket has");
            }
            if self.keeps_account && group.role == Role::Listen {
                // It only saves another agent an attempt.
                let _ = next.keep_account();
            }
            is_more |= next.sockets.len() > group.sockets.len() || !next.has_sockets_of(group);
            groups.push(next);
        }
        let pending = is_more.then(|| Arc::new(()));
        self.pending = pending.as_ref().map(Arc::downgrade).unwrap_or_default();
        Ok(ListenChange { groups, workers, pending })
    }

    fn elsewhere(
        &self,
        group: &ListenGroup,
        address: SocketAddr,
        workers: usize,
        may_bind: bool,
    ) -> Result<ListenGroup> {
        ensure!(may_bind, "its send buffers would need a capability that the agent has dropped");
        ensure!(!self.lent.is_lent(), "another agent is taking the present sockets over");
        if self.groups.iter().all(|group| group.address.port() != address.port()) {
            warn_if_shared(address);
        }
        let next = ListenGroup::open(group.role, address, workers, Vec::new())?;
        Ok(ListenGroup { acceptor: group.acceptor.clone(), ..next })
    }

    /// The addresses of the agent with `change`.
    pub(super) fn own_after(change: &ListenChange, admin: SocketAddr) -> Listeners {
        own(&change.groups, admin)
    }

    /// Listens with the sockets of `change`. Returns the sockets of each worker, and those before, to be dropped once the workers have
    /// the others. Changes nothing if it fails.
    pub(super) fn apply(&mut self, change: ListenChange) -> io::Result<(Vec<Vec<Listener>>, Replaced)> {
        let listeners = listen(&change.groups, change.workers)?;
        let groups = std::mem::replace(&mut self.groups, change.groups);
        let is_kept = groups.iter().zip(&self.groups).map(|(before, after)| after.has_sockets_of(before)).collect();
        Ok((listeners, Replaced { groups, is_kept }))
    }

    /// Duplicates for another process, which has them as long as the loan lasts.
    pub(super) fn passed(&self) -> io::Result<(Vec<Passed>, Loan)> {
        if self.pending.strong_count() > 0 {
            return Err(io::Error::other("the running agent is changing its sockets: start again after its reload"));
        }
        let group = |group: &ListenGroup| {
            let passed = |socket: &Arc<TcpListener>| Passed::duplicate(group.role, group.held, socket);
            group.sockets.iter().map(passed).collect::<Vec<_>>()
        };
        let passed = self.groups.iter().flat_map(group).collect::<io::Result<_>>()?;
        Ok((passed, self.lent.lend()))
    }

    /// Leaves the sockets of `roles` to another process: stops accepting at once, and closes this process's descriptors.
    pub(super) fn release(&mut self, roles: &[Role]) {
        for group in self.groups.iter_mut().filter(|group| roles.contains(&group.role)) {
            group.stop.send_replace(Stop::Released);
            group.sockets.clear();
        }
    }

    /// Closes this process's descriptors: of sockets that another process has, too, at once, of others when the workers have accepted
    /// what waits in the queues.
    pub(super) fn close(&mut self) {
        let is_lent = self.lent.is_lent();
        for group in &mut self.groups {
            group.stop(if group.held || is_lent { Stop::Released } else { Stop::Closed });
            group.sockets.clear();
        }
    }

    fn plain(&self) -> &ListenGroup {
        &self.groups[0]
    }
}

/// The listeners that workers had before a change. Dropping it stops them, and closes sockets that are not used any more when the
/// workers have accepted what waits in their queues.
pub(super) struct Replaced {
    groups: Vec<ListenGroup>,
    /// For each group: the workers have other listeners of the same sockets.
    is_kept: Vec<bool>,
}

impl Drop for Replaced {
    fn drop(&mut self) {
        for (group, is_kept) in self.groups.iter().zip(&self.is_kept) {
            // Another process has none of those that are not kept, see `prepare`.
            group.stop(if *is_kept { Stop::Released } else { Stop::Closed });
        }
    }
}

impl ListenGroup {
    fn open(role: Role, address: SocketAddr, count: usize, passed: Vec<Passed>) -> io::Result<Self> {
        let (configured, held) = (address, passed.iter().any(|one| one.held));
        let mut sockets: Vec<TcpListener> = passed.into_iter().map(|one| one.socket).collect();
        sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        if let Some(first) = sockets.first() {
            let address = first.local_addr()?;
            // The queues of a service manager's sockets outlive the agent; those of further ones would not.
            let missing = if held { 0 } else { count.saturating_sub(sockets.len()) };
            sockets.extend(further(address, missing));
        } else {
            sockets = bind(address, count)?;
        }
        let address = sockets[0].local_addr()?;
        let sockets = sockets.into_iter().map(Arc::new).collect();
        Ok(Self { role, configured, address, held, sockets, acceptor: None, stop: watch::Sender::new(Stop::No) })
    }

    /// The same sockets for other listeners, and further ones if there are fewer than `count`.
    fn with(&self, count: usize) -> Self {
        let more = further(self.address, count.saturating_sub(self.sockets.len()));
        let sockets = self.sockets.iter().cloned().chain(more.into_iter().map(Arc::new)).collect();
        let (acceptor, stop) = (self.acceptor.clone(), watch::Sender::new(Stop::No));
        Self { sockets, acceptor, stop, ..*self }
    }

    fn has_sockets_of(&self, other: &Self) -> bool {
        other.sockets.iter().all(|one| self.sockets.iter().any(|own| Arc::ptr_eq(own, one)))
    }

    fn keep_account(&self) -> io::Result<()> {
        self.sockets.iter().try_for_each(socket::keep_account)
    }

    /// Stops the listeners, unless they have been stopped.
    fn stop(&self, stop: Stop) {
        self.stop.send_if_modified(|before| *before == Stop::No && std::mem::replace(before, stop) != stop);
    }
}

/// The addresses of the agent, with the ports that were bound.
fn own(groups: &[ListenGroup], admin: SocketAddr) -> Listeners {
    Listeners::new(groups.iter().map(|group| group.address).chain([admin]))
}

/// Begins to listen where `groups` do not listen yet, and returns the sockets of each of `count` workers.
fn listen(groups: &[ListenGroup], count: usize) -> io::Result<Vec<Vec<Listener>>> {
    let mut listeners: Vec<Vec<_>> = (0..count).map(|_| Vec::new()).collect();
    for group in groups {
        for (worker, sockets) in listeners.iter_mut().zip(shares(group.sockets.len(), count)) {
            for index in sockets {
                let socket = group.sockets[index].try_clone()?;
                worker.push(Listener { socket, tls: group.acceptor.clone(), stop: group.stop.subscribe() });
            }
        }
    }
    // Last, because a socket that listens gets connections.
    for socket in groups.iter().flat_map(|group| &group.sockets) {
        socket2::SockRef::from(&**socket).listen(BACKLOG)?;
    }
    Ok(listeners)
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

/// Up to `count` further sockets at an address; workers share those there are if another user has opened them.
fn further(address: SocketAddr, count: usize) -> Vec<TcpListener> {
    let bound = bind(address, count);
    bound.unwrap_or_else(|error| {
        tracing::debug!(%address, %error, "cannot bind further sockets, workers share the present ones");
        Vec::new()
    })
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
mod tests;
