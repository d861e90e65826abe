//! A response that the kernel may carry from its first byte on, head included.
//!
//! The order is that of a span (`span`): the request has been sent whole; arm, read once more, wait. The kernel looks at the head
//! (`penstock_common::head`), redirects it with what has come with it where it can be passed on as it is, and lets go; else it
//! leaves everything to user space. How the body goes on is chosen afterwards, as ever.
//!
//! Nobody may answer the client in the endpoint's place before it is certain that the kernel has not ([`Opening::cease`]).

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;
use penstock_common::{framing::Framing, head::EVENT_STREAM, slot::stop};

use super::{Account, Target};
use crate::{
    endpoint::connection::EndpointConnection,
    kernel::{
        slots::{Lane, SpanRef},
        socket,
    },
};

/// A request's response while the kernel may have it. It outlives whoever waits for it.
#[derive(Default)]
pub struct Opening {
    handed: Cell<Option<Handed>>,
}

struct Handed {
    endpoint: EndpointConnection,
    target: Target,
    /// What had been redirected before, and in how many segments.
    redirected: u64,
    segments: u64,
    /// Taken back while the kernel had it.
    torn: bool,
}

/// What the kernel has carried of a response whose head nobody has read.
pub struct Begun {
    pub target: Target,
    /// The body behind it.
    pub framing: Framing,
    pub event_stream: bool,
    /// With the head; `account` is without.
    pub redirected: u64,
    pub account: Account,
}

impl Opening {
    /// Hands the response to the kernel. The request has been sent, everything redirected to the client before has arrived,
    /// and the connection has a slot.
    pub fn begin(&self, endpoint: EndpointConnection, target: Target) {
        let (mut redirected, mut segments) = (0, 0);
        if let Some(source) = endpoint.source() {
            let span = source.slot().span(target.lane);
            (redirected, segments) = (span.redirected(), span.segments());
            span.begin_message();
            source.slot().arm(target.lane, target.key, Framing::head(), endpoint.consumed, false);
        }
        self.handed.set(Some(Handed { endpoint, target, redirected, segments, torn: false }));
    }

    /// Waits until the kernel has let go of it, or something has come that is for user space, which `buf` then has.
    pub async fn wait(&self, buf: &mut BytesMut) -> io::Result<()> {
        if let Some(read) = self.with(|handed| handed.endpoint.read_now(buf)) {
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(drop),
            }
        }
        poll_fn(|cx| self.with(|handed| handed.poll(cx, buf)).unwrap_or(Poll::Ready(Ok(())))).await
    }

    /// Takes it back; with it what the kernel has carried, if anything. `None`: nobody had it.
    pub async fn cease(&self) -> Option<(EndpointConnection, Option<Begun>)> {
        if self.with(Handed::tear)? {
            // A message program that has seen the arming may be at work on another processor.
            let _ = tokio::task::spawn_blocking(socket::wait_for_programs).await;
        }
        let mut handed = self.handed.take()?;
        let begun = handed.begun();
        Some((handed.endpoint, begun))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Handed) -> T) -> Option<T> {
        let mut handed = self.handed.take()?;
        let result = work(&mut handed);
        self.handed.set(Some(handed));
        Some(result)
    }
}

impl Handed {
    fn span(&self) -> Option<SpanRef<'_>> {
        self.endpoint.source().map(|source| source.slot().span(self.target.lane))
    }

    fn poll(&mut self, cx: &mut Context<'_>, buf: &mut BytesMut) -> Poll<io::Result<()>> {
        let lane = self.target.lane;
        if self.endpoint.source().is_none_or(|source| source.poll_released(lane, cx).is_ready()) {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.endpoint.poll_readable(cx))?;
            match self.endpoint.try_read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }

    /// The kernel gets it no more; true when it may still be at work on it.
    fn tear(&mut self) -> bool {
        let Some(span) = self.span() else { return false };
        // Also when a caller has given up in between.
        let torn = self.torn || !span.is_released();
        if torn {
            span.disarm();
            if self.target.lane == Lane::Ingress {
                self.endpoint.wait_for_verdict();
            }
        }
        self.torn = torn;
        torn && self.target.lane == Lane::Local
    }

    fn begun(&mut self) -> Option<Begun> {
        let span = self.span()?;
        let mut account = Account { head: true, ..Account::default() };
        let (redirected, why) = (span.redirected().saturating_sub(self.redirected), span.stop());
        if why != 0
            && let Some(count) = account.stops.get_mut(why as usize)
        {
            *count += 1;
        }
        if redirected == 0 {
            self.endpoint.heads_refused += u32::from(why == stop::HEAD);
            return None;
        }
        let head = span.head();
        let body = redirected.saturating_sub(u64::from(head & !EVENT_STREAM));
        match self.target.lane {
            Lane::Ingress => account.steered = body,
            Lane::Local => account.local = body,
        }
        account.segments = span.segments().saturating_sub(self.segments);
        (account.first_ns, account.last_ns) = span.stamps();
        let event_stream = head & EVENT_STREAM != 0;
        let framing = span.framing();
        self.endpoint.heads_refused = 0;
        Some(Begun { target: self.target, framing, event_stream, redirected, account })
    }
}
