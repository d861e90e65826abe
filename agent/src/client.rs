//! A client as the phases of a request know it, whatever it speaks: it sends a body, it may leave, it gets one answer.

pub mod close;
pub mod ledger;
pub mod patience;
pub mod reach;
mod socket;
mod stream;
mod traffic;
mod wire;

use std::{io, time::Duration};

use bytes::BytesMut;
use http::Method;

pub use socket::ClientSocket;
pub use stream::ClientStream;
pub use traffic::Traffic;
pub use wire::Wire;

use crate::{config::HalfClose, http::reply::Reply};

pub enum Client {
    Http1(ClientSocket),
    Http2(ClientStream),
}

impl Client {
    /// Resolves when the client has left. Cancel-safe. See [`ClientSocket::gone`].
    pub async fn gone(&mut self) {
        match self {
            Self::Http1(socket) => socket.gone().await,
            Self::Http2(stream) => stream.gone().await,
        }
    }

    /// Whether what it sends is encrypted on its way.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Http1(socket) => socket.is_tls(),
            Self::Http2(stream) => stream.is_tls(),
        }
    }

    /// The answer to the next request is to come.
    pub fn begin_answer(&mut self) {
        if let Self::Http1(socket) = self {
            socket.begin_answer();
        }
    }

    /// Something of the answer has been sent.
    pub fn is_answered(&self) -> bool {
        match self {
            Self::Http1(socket) => socket.is_answered(),
            Self::Http2(stream) => stream.is_answered(),
        }
    }

    /// What counts as having left, from now on.
    pub fn set_leaving(&mut self, half_close: HalfClose, unreachable: Option<Duration>) {
        // Of HTTP/2 the connection minds.
        if let Self::Http1(socket) = self {
            socket.set_leaving(half_close, unreachable);
        }
    }

    /// How long the client may take nothing of what it is sent, from now on.
    pub fn set_idle(&mut self, idle: Option<Duration>) {
        match self {
            Self::Http1(socket) => socket.set_idle(idle),
            Self::Http2(stream) => stream.set_idle(idle),
        }
    }

    /// Of the request something may be on its way that nobody will read.
    pub fn set_unread(&mut self, unread: bool) {
        // A stream of HTTP/2 says by itself that it wants no more.
        if let Self::Http1(socket) = self {
            socket.unread = unread;
        }
    }

    /// Sends a whole answer to a request with this method.
    pub async fn reply(&mut self, method: &Method, reply: &Reply, keep_alive: bool) -> io::Result<()> {
        match self {
            Self::Http1(socket) => {
                let mut out = BytesMut::new();
                reply.write(&mut out, method, keep_alive);
                socket.write_all(&out).await
            }
            Self::Http2(stream) => {
                let (head, body) = reply.frames(method);
                stream.reply(head, body).await
            }
        }
    }
}
