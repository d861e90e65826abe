//! Who accepts: the sockets and the workers, and how a reload changes them.

use std::{io, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    sockets::{ListenChange, Sockets},
    workers::{Spawner, WorkerThread},
};
use crate::{
    config::Listen,
    server::Listener,
    takeover::{Loan, Passed, Role},
};

pub(super) struct Listening {
    sockets: Sockets,
    workers: Vec<WorkerThread>,
    /// Workers without sockets: they serve the connections that they have, and end after the last.
    retired: Vec<WorkerThread>,
    spawner: Spawner,
    /// Sockets that are bound later are as good as those bound at the start.
    may_bind: bool,
    /// The sockets have been closed or left to another process, and change no more.
    is_closed: bool,
}

/// The number of workers that the configuration asks for.
pub(super) fn worker_count(listen: &Listen) -> usize {
    match listen.workers {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

impl Listening {
    pub(super) fn new(sockets: Sockets, workers: Vec<WorkerThread>, spawner: Spawner, may_bind: bool) -> Self {
        Self { sockets, workers, retired: Vec::new(), spawner, may_bind, is_closed: false }
    }

    /// Begins to accept.
    pub(super) fn accept(&mut self) -> io::Result<()> {
        let listeners = self.sockets.listen(self.workers.len())?;
        self.distribute(listeners);
        Ok(())
    }

    /// Has each worker accept from its share, too.
    fn distribute(&self, listeners: Vec<Vec<Listener>>) {
        self.workers.iter().zip(listeners).for_each(|(worker, listeners)| worker.accept_from(listeners));
    }

    /// Binds what `listen` needs, without accepting.
    pub(super) fn prepare(&mut self, listen: &Listen) -> Result<ListenChange> {
        self.sockets.prepare(listen, worker_count(listen), self.may_bind)
    }

    /// Starts workers, has all of them accept from the sockets of `change`, and retires those that are too many. Changes nothing if it
    /// fails, or if the agent has begun to stop.
    pub(super) fn apply(&mut self, change: ListenChange) -> Result<()> {
        let count = change.workers;
        if self.is_closed || count == self.workers.len() && change.is_empty() {
            return Ok(());
        }
        let started = (self.workers.len()..count).map(|_| self.spawner.start_later()).collect::<Result<Vec<_>>>()?;
        let (listeners, replaced) = self.sockets.apply(change).context("cannot listen")?;
        self.workers.extend(started);
        let retired = self.workers.split_off(count);
        self.distribute(listeners);
        // Stops after the new ones accept.
        drop(replaced);
        self.retired.retain(|worker| !worker.is_finished());
        self.retired.extend(retired.into_iter().map(WorkerThread::retire));
        Ok(())
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.sockets.address()
    }

    pub(super) fn tls_address(&self) -> Option<SocketAddr> {
        self.sockets.tls_address()
    }

    pub(super) fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Duplicates of the sockets for another process, which has them as long as the loan lasts.
    pub(super) fn passed(&self) -> io::Result<(Vec<Passed>, Loan)> {
        self.sockets.passed()
    }

    /// Leaves the sockets of `roles` to another process.
    pub(super) fn release(&mut self, roles: &[Role]) {
        self.is_closed = true;
        self.sockets.release(roles);
    }

    /// Stops accepting, after what waits in the queues.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
        self.sockets.close();
    }

    /// The longest time that a worker has not come round to its own work.
    pub(super) fn silence(&self) -> Duration {
        self.all().map(WorkerThread::silence).max().unwrap_or_default()
    }

    pub(super) fn is_done(&self) -> bool {
        self.all().all(WorkerThread::is_finished)
    }

    /// Takes the threads, to wait for them.
    pub(super) fn take_workers(&mut self) -> Vec<WorkerThread> {
        self.workers.drain(..).chain(self.retired.drain(..)).collect()
    }

    fn all(&self) -> impl Iterator<Item = &WorkerThread> {
        self.workers.iter().chain(&self.retired)
    }
}
