//! Delivers a response if both sides speak HTTP/1.1: the head, then the body's bytes unchanged.
//!
//! Whenever user space holds no bytes, the session may arm the kernel; what the kernel passes is relayed.

use std::rc::Rc;

use bytes::BytesMut;

use super::{End, written};
use crate::{
    client::ClientSocket,
    deadline,
    endpoint::connection::EndpointConnection,
    kernel::{socket::monotonic_ns, wire::Watched},
    steer::session::Session,
};

/// First read buffer; it grows towards the largest while reads fill it.
const MIN_BUFFER: usize = 16 * 1024;
const MAX_BUFFER: usize = 256 * 1024;

/// The delivery of one response. Set the public fields before [`run`](Self::run).
pub struct Delivery<'a> {
    /// Where the response goes.
    pub client: &'a mut ClientSocket,
    /// Where the body comes from.
    pub endpoint: &'a mut EndpointConnection,
    /// What carries the body; afterwards it has the account of it.
    pub session: Session<'a>,
    /// The response head or nothing. It is written before the body, together with the body's first bytes if there are any.
    pub lead: BytesMut,
    /// Read from the endpoint and not yet written.
    pending: BytesMut,
    /// Decode chunked for a client that does not support it.
    pub decode: bool,
    /// The flow on path `wire`, until its end.
    pub wire: Option<Rc<Watched>>,
    /// Size of the next read.
    buffer: usize,
}

impl Drop for Delivery<'_> {
    /// A forced stop and a panic drop the delivery before its end: the peers must learn it.
    fn drop(&mut self) {
        self.cut_splice();
    }
}

impl<'a> Delivery<'a> {
    /// `pending` was read after the head; the session's framing begins with it.
    pub fn new(
        client: &'a mut ClientSocket,
        endpoint: &'a mut EndpointConnection,
        session: Session<'a>,
        pending: BytesMut,
    ) -> Self {
        Self {
            client,
            endpoint,
            session,
            lead: BytesMut::new(),
            pending,
            decode: false,
            wire: None,
            buffer: MIN_BUFFER,
        }
    }

    /// Delivers the whole body.
    pub async fn run(&mut self) -> End {
        loop {
            let step = match self.forward().await {
                Err(end) => Err(end),
                Ok(()) if self.session.framing.is_invalid() => Err(End::Broken),
                Ok(()) if self.is_complete() => Err(End::Complete { reusable: self.pending.is_empty() }),
                Ok(()) => self.more().await,
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Reclaims the flow after [`run`](Self::run) was dropped. Both connections can then only be closed.
    pub fn abandon(&mut self) {
        self.cut_splice();
        self.session.abandon(self.endpoint, self.client);
    }

    /// Resets both peers of a flow on path `wire` that has begun and not ended.
    fn cut_splice(&mut self) {
        if self.wire.as_ref().is_some_and(|watched| !watched.disarm()) {
            self.conclude(Some(End::Over));
        }
    }

    /// Whether the last byte of the message is written or redirected.
    fn is_complete(&self) -> bool {
        self.session.rest == 0 && self.session.framing.is_done()
    }

    /// Writes the bytes in `pending` up to the end of the message.
    async fn forward(&mut self) -> Result<(), End> {
        let mut lead = std::mem::take(&mut self.lead);
        let session = &mut self.session;
        if session.rest > 0 {
            let rest = self.pending.split_to(self.pending.len().min(session.rest.try_into().unwrap_or(usize::MAX)));
            written(self.client.write_all(&rest).await)?;
            session.rest -= rest.len() as u64;
            session.account.relayed += rest.len() as u64;
            if session.rest > 0 {
                return Ok(());
            }
        }
        while !self.pending.is_empty() && !session.framing.is_done() && !session.framing.is_invalid() {
            let begin = session.framing;
            let (taken, payload) = if self.decode {
                let (taken, payload) = session.framing.next(&self.pending);
                (taken, payload.unwrap_or_default())
            } else {
                let taken = session.framing.feed(&self.pending);
                // The last byte taken of an invalid body is the wrong one.
                (taken, &self.pending[..taken - usize::from(session.framing.is_invalid())])
            };
            if let Some(tee) = session.tee {
                // Before the write, so that the EPP does not wait for the client.
                tee.borrow_mut().take_framed(begin, &self.pending[..taken]);
            }
            let out = if lead.is_empty() {
                payload
            } else {
                lead.extend_from_slice(payload);
                &lead
            };
            written(self.client.write_all(out).await)?;
            lead.clear();
            let _ = self.pending.split_to(taken);
            let now = monotonic_ns();
            session.account.stamp(now, now);
            session.account.add_relayed(taken);
        }
        if lead.is_empty() { Ok(()) } else { written(self.client.write_all(&lead).await) }
    }

    /// Lets the kernel carry more of the body, or reads it.
    async fn more(&mut self) -> Result<(), End> {
        self.make_room();
        // A request that is still being sent needs the connection as it is.
        if self.endpoint.is_sent() && self.wire.is_some() {
            return self.splice().await;
        }
        if self.endpoint.is_sent() {
            let carried = self.session.carry(self.endpoint, self.client, &mut self.pending).await?;
            if self.pending.capacity() == 0 {
                // The kernel had the flow for a while.
                self.buffer = MIN_BUFFER;
            }
            self.received(self.pending.len());
            if carried {
                return Ok(());
            }
        }
        self.read().await
    }

    /// Reads more of the body.
    pub(super) async fn read(&mut self) -> Result<(), End> {
        self.make_room();
        let (client, endpoint, pending) = (&mut *self.client, &mut *self.endpoint, &mut self.pending);
        let idle = deadline::elapsed(self.session.idle);
        let received = tokio::select! {
            biased;
            received = endpoint.read(pending) => received,
            () = client.gone() => return Err(End::ClientGone),
            () = idle => return Err(End::Idle),
        };
        match received {
            Ok(0) if self.session.rest == 0 && self.session.framing.may_close() => {
                Err(End::Complete { reusable: false })
            }
            Ok(0) => Err(End::Broken),
            Ok(n) => {
                self.received(n);
                Ok(())
            }
            Err(_) => Err(End::Broken),
        }
    }

    /// Reserves capacity for the next read.
    fn make_room(&mut self) {
        if self.pending.capacity() - self.pending.len() < self.buffer {
            self.pending.reserve(self.buffer);
        }
    }

    /// Makes the next read larger after one that filled the buffer.
    fn received(&mut self, n: usize) {
        if n >= self.buffer {
            self.buffer = (self.buffer * 4).min(MAX_BUFFER);
        }
    }
}
