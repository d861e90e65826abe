//! The client side of a request, independent of the protocol: its body, its departure, and one answer.

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
use http::{Method, Response, StatusCode, Version};

pub use socket::ClientSocket;
pub use stream::ClientStream;
pub use traffic::Traffic;
pub use wire::ClientIo;

use crate::{config::HalfClose, http::reply::Reply};

pub enum Client {
    Http1(ClientSocket),
    Http2(ClientStream),
}

impl Client {
    /// Resolves when the client is gone. Cancel-safe. See [`ClientSocket::gone`].
    pub async fn gone(&mut self) {
        match self {
            Self::Http1(socket) => socket.gone().await,
            Self::Http2(stream) => stream.gone().await,
        }
    }

    /// Whether the client's connection is encrypted.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Http1(socket) => socket.is_tls(),
            Self::Http2(stream) => stream.is_tls(),
        }
    }

    /// Resets `is_answered` for the next request, whose client speaks this version.
    pub fn begin_answer(&mut self, version: Version) {
        if let Self::Http1(socket) = self {
            socket.begin_answer(version);
        }
    }

    /// Asks a client that expects `100 Continue` for the body, unless some of it is here already (RFC 9110 §10.1.1).
    pub async fn send_continue(&mut self) -> io::Result<()> {
        match self {
            Self::Http1(socket) if socket.buf.is_empty() => socket.interim(b"HTTP/1.1 100 Continue\r\n\r\n").await,
            Self::Http1(_) => Ok(()),
            Self::Http2(stream) => {
                if stream.has_begun() {
                    return Ok(());
                }
                let mut head = Response::new(());
                *head.status_mut() = StatusCode::CONTINUE;
                stream.interim(head).await
            }
        }
    }

    /// Whether any part of the answer has been sent.
    pub fn is_answered(&self) -> bool {
        match self {
            Self::Http1(socket) => socket.is_answered(),
            Self::Http2(stream) => stream.is_answered(),
        }
    }

    /// Sets when an HTTP/1.1 client counts as gone.
    pub fn set_leaving(&mut self, half_close: HalfClose, unreachable: Option<Duration>) {
        // For HTTP/2 the connection detects this.
        if let Self::Http1(socket) = self {
            socket.set_leaving(half_close, unreachable);
        }
    }

    /// Sets how long the client may go without acknowledging data.
    pub fn set_idle(&mut self, idle: Option<Duration>) {
        match self {
            Self::Http1(socket) => socket.set_idle(idle),
            Self::Http2(stream) => stream.set_idle(idle),
        }
    }

    /// Marks whether unread bytes of the request may still arrive.
    pub fn set_unread(&mut self, unread: bool) {
        // An HTTP/2 stream is reset instead.
        if let Self::Http1(socket) = self {
            socket.unread = unread;
        }
    }

    /// Sends a complete answer to a request with this method.
    pub async fn reply(&mut self, method: &Method, reply: &Reply, keep_alive: bool) -> io::Result<()> {
        match self {
            Self::Http1(socket) => {
                let mut out = BytesMut::new();
                reply.write(&mut out, method, keep_alive, socket.version());
                socket.write_all(&out).await
            }
            Self::Http2(stream) => {
                let (head, body) = reply.frames(method);
                stream.reply(head, body).await
            }
        }
    }
}
