//! Who may be steered and how a connection becomes known to the kernel program.
//!
//! Only this module inserts sockets. An endpoint connection is announced before it connects, so that the kernel recognises
//! the endpoint's socket where that is on this machine, and inserted once, right after connect and before its first
//! request, when its receive queue is empty (bytes queued before insertion are not seen, and partly read ones are sent
//! twice); it stays until it is closed, because taking it out would lose bytes that were let through. A client
//! connection is inserted when it first becomes a target.

pub mod eligibility;
pub mod reason;

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::AsFd,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use penstock_common::{path::Path, slot::admission};
use thiserror::Error;

use crate::kernel::{Kernel, LoadError, Maps, Ring, slots::SlotRef, socket};

/// Whether the kernel can steer, and if not, why.
#[derive(Clone)]
pub enum Steering {
    Active(Arc<Kernel>),
    /// Switched off in the configuration.
    Off,
    Unavailable(Arc<str>),
}

impl Steering {
    /// What a worker needs; `None` when it only relays.
    pub fn worker(&self) -> Result<Option<Rc<WorkerSteering>>, LoadError> {
        let Self::Active(kernel) = self else { return Ok(None) };
        WorkerSteering::new(kernel).map(Some)
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
    pub fn new(kernel: &Arc<Kernel>) -> Result<Rc<Self>, LoadError> {
        Ok(Rc::new(Self { kernel: Arc::clone(kernel), maps: RefCell::new(kernel.maps()?) }))
    }

    /// Announces a connection that is about to be made from this socket.
    pub fn announce_source(self: &Rc<Self>, endpoint: impl AsFd) -> Result<Source, RegisterError> {
        let cookie = socket::cookie(&endpoint)?;
        let index = self.kernel.slots().take().ok_or(RegisterError::NoSlot)?;
        let (ring, admitted) = (Cell::new(false), Cell::new(false));
        let source = Source { index, cookie, ring, admitted, steering: Rc::clone(self) };
        source.slot().reset();
        self.maps.borrow_mut().index.insert(cookie, index, 0)?;
        Ok(source)
    }

    /// Endpoints on this machine are recognised.
    pub fn has_local(&self) -> bool {
        self.kernel.local().is_ok()
    }

    /// An endpoint can tell that its socket is in a map while bytes for it wait there.
    pub fn is_endpoint_visible(&self) -> bool {
        self.kernel.endpoint_visible().is_some()
    }

    /// Makes a connection a possible target, with this send buffer; returns its key. The kernel forgets it when it is closed.
    pub fn register_target(&self, client: impl AsFd, send_buffer: u32) -> Result<u64, RegisterError> {
        socket::set_send_buffer(&client, send_buffer)?;
        socket::take_all_that_fits(&client)?;
        socket::keep_account(&client)?;
        let cookie = socket::cookie(&client)?;
        self.maps.borrow_mut().targets.insert(cookie, client.as_fd().as_raw(), 0)?;
        Ok(cookie)
    }

    /// Events of the kernel that found no room, of all workers, since anyone last asked.
    pub fn take_missed_events(&self) -> u64 {
        self.kernel.events().take_missed()
    }
}

/// An endpoint connection's slot. Drop it only after the socket is closed: then no verdict can touch the slot any more.
pub struct Source {
    index: u32,
    cookie: u64,
    /// The connection has a ring.
    ring: Cell<bool>,
    /// The endpoint's own socket is in the map.
    admitted: Cell<bool>,
    steering: Rc<WorkerSteering>,
}

impl Source {
    /// The connection has been made: from now on the kernel sees what arrives. Nothing may have been received yet.
    pub fn insert(&self, endpoint: impl AsFd) -> Result<(), RegisterError> {
        Ok(self.steering.maps.borrow_mut().sources.insert(self.cookie, endpoint.as_fd().as_raw(), 0)?)
    }

    pub fn slot(&self) -> SlotRef<'_> {
        self.steering.kernel.slots().get(self.index)
    }

    /// Makes room for a copy of the last payload bytes, once. Fails when kernel memory or the map is exhausted.
    pub fn make_ring(&self) -> Result<(), RegisterError> {
        if !self.ring.get() {
            self.steering.maps.borrow_mut().tails.insert(self.index, [0; size_of::<Ring>()], 0)?;
            self.ring.set(true);
        }
        Ok(())
    }

    /// The ring as it is. Only while the slot is released.
    pub fn ring(&self) -> Result<Ring, RegisterError> {
        Ok(self.steering.maps.borrow().tails.get(&self.index, 0)?)
    }

    /// Ready when the kernel has let go of the span; the task is woken when it does.
    pub fn poll_released(&self, path: Path, cx: &mut Context<'_>) -> Poll<()> {
        let Some(span) = self.slot().span(path) else { return Poll::Ready(()) };
        self.steering.kernel.events().poll_released(self.index, span, cx)
    }

    /// Whether the endpoint's own `sendmsg` can carry a response to the client with this key, which was announced.
    pub fn is_local_to(&self, target: u64) -> bool {
        self.slot().peer().is_some() && self.slot().has_found(target)
    }

    /// Puts the endpoint's own socket into the map for the length of a response, if the endpoint has read the whole request.
    pub fn admit(&self) -> bool {
        if !self.admitted.get() {
            let outcome = self.steering.kernel.admit(self.cookie, false);
            match &outcome {
                Ok(admission::DONE) => self.admitted.set(true),
                Ok(why) => tracing::debug!(reason = admission::label(*why), "endpoint socket not admitted"),
                Err(error) => tracing::debug!(%error, "endpoint socket not admitted"),
            }
        }
        self.admitted.get()
    }

    /// Takes the endpoint's own socket out of the map. False: the endpoint could still tell that it was in it, so nothing may be
    /// written to this connection.
    pub fn dismiss(&self) -> bool {
        if !self.admitted.get() {
            return true;
        }
        let outcome = self.steering.kernel.admit(self.cookie, true);
        match &outcome {
            Ok(admission::DONE) => {
                self.admitted.set(false);
                return true;
            }
            Ok(why) => tracing::debug!(reason = admission::label(*why), "endpoint socket not dismissed"),
            Err(error) => tracing::debug!(%error, "endpoint socket not dismissed"),
        }
        false
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.dismiss();
        // Missing when registration failed half-way.
        let mut maps = self.steering.maps.borrow_mut();
        let _ = maps.index.remove(&self.cookie);
        if self.ring.get() {
            let _ = maps.tails.remove(&self.index);
        }
        let slots = self.steering.kernel.slots();
        match self.slot().peer() {
            Some(peer) => {
                let _ = maps.locals.remove(&peer);
                slots.retire(self.index);
            }
            None => slots.give_back(self.index),
        }
    }
}

/// aya takes anything with a raw descriptor.
trait AsRaw {
    fn as_raw(&self) -> std::os::fd::RawFd;
}

impl AsRaw for std::os::fd::BorrowedFd<'_> {
    fn as_raw(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd as _;
        self.as_raw_fd()
    }
}
