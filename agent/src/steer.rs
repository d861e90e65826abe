//! Steers flows: registers connections with the kernel programs, and owns each flow that the kernel may carry (`session.rs`).
//!
//! Only this module inserts sockets. An endpoint connection is announced before it connects, so that the kernel recognises an
//! endpoint's socket on this machine. It is inserted once, before its first request, when its receive queue is empty (bytes queued
//! before are not seen, and partly read segments are sent twice), and stays until it is closed, because removal would lose passed
//! bytes. A client connection is inserted when it first becomes a target.

pub mod account;
pub mod eligibility;
pub mod reader;
pub mod reason;
pub mod session;
pub mod source;
pub mod wire;

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::{AsFd, AsRawFd as _},
    rc::Rc,
    sync::Arc,
};

use thiserror::Error;

pub use source::Source;

use crate::kernel::{Kernel, LoadError, Maps, socket, wire::Wire};

/// Whether the kernel can steer, and if not, the reason.
#[derive(Clone)]
pub enum SteeringSupport {
    Active(Arc<Kernel>),
    /// Path `wire` alone.
    Wire(Arc<Wire>),
    /// Switched off in the configuration.
    Off,
    Unavailable(Arc<str>),
}

impl SteeringSupport {
    /// The handles of the socket maps for a worker; `None` if it uses none.
    pub fn worker(&self) -> Result<Option<Rc<WorkerSteering>>, LoadError> {
        let Self::Active(kernel) = self else { return Ok(None) };
        WorkerSteering::new(kernel).map(Some)
    }

    pub fn wire(&self) -> Option<Arc<Wire>> {
        if let Self::Wire(wire) = self { Some(Arc::clone(wire)) } else { None }
    }
}

#[derive(Debug, Error)]
pub enum RegisterError {
    #[error("no slot is free")]
    NoSlot,
    #[error("the kernel refuses the socket: {0}")]
    Map(#[from] aya::maps::MapError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One worker's handles of the maps.
pub struct WorkerSteering {
    kernel: Arc<Kernel>,
    maps: RefCell<Maps>,
}

impl WorkerSteering {
    /// Duplicates the descriptors of the kernel's maps. Fails if that does, as at the limit of open files.
    pub fn new(kernel: &Arc<Kernel>) -> Result<Rc<Self>, LoadError> {
        Ok(Rc::new(Self { kernel: Arc::clone(kernel), maps: RefCell::new(kernel.maps()?) }))
    }

    /// Announces the connection that is about to be made from this socket.
    pub fn announce_source(self: &Rc<Self>, endpoint: impl AsFd) -> Result<Source, RegisterError> {
        let cookie = socket::cookie(&endpoint)?;
        let index = self.kernel.slots().take().ok_or(RegisterError::NoSlot)?;
        let (ring, admitted) = (Cell::new(false), Cell::new(false));
        let source = Source { index, cookie, ring, admitted, steering: Rc::clone(self) };
        source.slot().reset();
        self.maps.borrow_mut().index.insert(cookie, index, 0)?;
        Ok(source)
    }

    /// Whether endpoints on this machine are recognised.
    pub fn has_local(&self) -> bool {
        self.kernel.local().is_ok()
    }

    /// Whether an endpoint can notice that its socket is in a map while bytes for it wait there.
    pub fn is_endpoint_visible(&self) -> bool {
        self.kernel.endpoint_visible().is_some()
    }

    /// Makes a connection a possible target with this send buffer, and returns its key. The kernel removes it when it is closed.
    pub fn register_target(&self, client: impl AsFd, send_buffer: u32) -> Result<u64, RegisterError> {
        socket::set_send_buffer(&client, send_buffer)?;
        socket::take_all_that_fits(&client)?;
        socket::keep_account(&client)?;
        let cookie = socket::cookie(&client)?;
        self.maps.borrow_mut().targets.insert(cookie, client.as_fd().as_raw_fd(), 0)?;
        Ok(cookie)
    }

    /// Events of the kernel, for all workers, that were lost since the last call because the ring buffer was full.
    pub fn take_missed_events(&self) -> u64 {
        self.kernel.events().take_missed()
    }
}
