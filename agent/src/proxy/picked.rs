//! The result of a pick.

use std::net::SocketAddr;

use penstock_proto::ext_proc::HeaderMutation;

use crate::{
    metrics::InFlightGauge,
    picker::{
        client::{PickStream, StreamEnding},
        exchange::{Body, ImmediateReply},
    },
    tee::Rest,
    upload::CompleteBody,
};

pub(super) struct Picked {
    /// In the order in which they are tried. Never empty.
    pub(super) endpoints: Vec<SocketAddr>,
    pub(super) mutation: HeaderMutation,
    pub(super) body: Body,
    /// Whether the pick may also be used for later requests of the connection, if the pool allows that.
    pub(super) reusable: bool,
    /// Whether the endpoints are those of an EPP, of this request or of the one that gave its lease.
    pub(super) by_epp: bool,
    /// The EPP's stream, which lives as long as the response.
    pub(super) stream: Option<PickStream>,
    /// Counts the stream in the metrics while it is open.
    pub(super) _open: Option<InFlightGauge>,
}

pub(super) enum PickOutcome {
    /// Send the request, whose whole body is here.
    Forward(Box<Picked>, CompleteBody),
    /// The EPP's immediate reply.
    Reply(ImmediateReply),
}

impl Picked {
    /// Ends the EPP's stream, if there is one, and waits for the EPP to close it, so that it does not count the request any more.
    pub(super) async fn end(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.end().await;
        }
        self._open = None;
    }

    /// Ends the EPP's stream, if there is one, after sending it the `rest` of the response body.
    pub(super) fn finish(&mut self, rest: Rest) -> Option<StreamEnding> {
        Some(self.stream.take()?.finish(rest))
    }
}

/// Resolves when the EPP evicts the request. Never resolves without a stream.
pub(super) async fn evicted(stream: &mut Option<PickStream>) -> ImmediateReply {
    match stream {
        Some(stream) => stream.evicted().await,
        None => std::future::pending().await,
    }
}
