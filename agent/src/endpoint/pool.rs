//! Idle HTTP/1.1 connections by endpoint, one pool per worker, reused last in, first out.
//!
//! A connection is kept for at most `ConnectionTimeouts::keep_alive`, which should be below the model server's own limit (uvicorn:
//! 5 s).

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
};

use tokio::time::Instant;

use super::{connection::EndpointConnection, timeouts::ConnectionTimeouts, tls::EndpointTls};
use crate::steer::{WorkerSteering, session::Inlet as _};

/// Most idle connections per endpoint.
const MAX_IDLE: usize = 256;

/// A worker's HTTP/1.1 connections to endpoints.
pub struct Http1Pool {
    /// By address and [`EndpointTls::id`].
    idle: RefCell<HashMap<(SocketAddr, u64), Vec<EndpointConnection>>>,
    steering: Option<Rc<WorkerSteering>>,
    times: Cell<ConnectionTimeouts>,
    receive_buffer: u32,
}

impl Http1Pool {
    /// An empty pool. `receive_buffer` is the size of the sockets' receive buffers in bytes.
    pub fn new(steering: Option<Rc<WorkerSteering>>, times: ConnectionTimeouts, receive_buffer: u32) -> Self {
        Self { idle: RefCell::default(), steering, times: Cell::new(times), receive_buffer }
    }

    /// Sets the timeouts of new and idle connections.
    pub fn set_times(&self, times: ConnectionTimeouts) {
        self.times.set(times);
    }

    /// The worker's steering; `None` if steering is off.
    pub fn steering(&self) -> Option<&Rc<WorkerSteering>> {
        self.steering.as_ref()
    }

    /// Takes an idle connection that the endpoint has not closed, made with the same TLS settings, or without TLS.
    pub fn reuse(&self, address: SocketAddr, tls: Option<&EndpointTls>) -> Option<EndpointConnection> {
        let mut idle = self.idle.borrow_mut();
        let key = (address, tls.map_or(0, EndpointTls::id));
        let connections = idle.get_mut(&key)?;
        while let Some(mut connection) = connections.pop() {
            if connection.idle_since.elapsed() < self.times.get().keep_alive && connection.is_alive() {
                connection.set_resting(false);
                return Some(connection);
            }
        }
        idle.remove(&key);
        None
    }

    /// Makes a new connection. The error kinds are those of `connect(2)` and `TimedOut`; a TLS handshake has others.
    pub async fn connect(&self, address: SocketAddr, tls: Option<&EndpointTls>) -> io::Result<EndpointConnection> {
        let (times, steering) = (self.times.get(), self.steering.as_ref());
        if let Some(tls) = tls {
            return EndpointConnection::connect_tls(address, times, tls, self.receive_buffer).await;
        }
        EndpointConnection::connect(address, times, steering, self.receive_buffer).await
    }

    /// Keeps a connection on which nothing is outstanding.
    pub fn put(&self, mut connection: EndpointConnection) {
        if connection.attentive().is_err() {
            return;
        }
        debug_assert!(connection.is_sent());
        connection.idle_since = Instant::now();
        let mut idle = self.idle.borrow_mut();
        let connections = idle.entry((connection.address, connection.tls_id)).or_default();
        if connections.len() == MAX_IDLE {
            connections.remove(0);
        }
        connections.push(connection);
    }

    /// Closes connections that were idle for too long or whose endpoint is no longer `wanted`. Called about once a second.
    pub fn sweep(&self, wanted: impl Fn(SocketAddr) -> bool) {
        self.idle.borrow_mut().retain(|&(address, _), connections| {
            let wanted = wanted(address);
            connections.retain(|connection| wanted && connection.idle_since.elapsed() < self.times.get().keep_alive);
            !connections.is_empty()
        });
    }
}
