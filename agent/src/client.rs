//! A client as the phases of a request know it, whatever it speaks: it sends a body, it may leave, it gets one answer.

mod socket;

use bytes::BytesMut;
use http::Method;

pub use socket::ClientSocket;

use crate::http::reply::Reply;

pub enum Client {
    Http1(ClientSocket),
}

impl Client {
    /// Resolves when the client has left. Cancel-safe. See [`ClientSocket::gone`].
    pub async fn gone(&self) {
        match self {
            Self::Http1(socket) => socket.gone().await,
        }
    }

    /// Sends a whole answer to a request with this method. What becomes of it is found by the next read.
    pub async fn reply(&mut self, method: &Method, reply: &Reply, keep_alive: bool) -> std::io::Result<()> {
        match self {
            Self::Http1(socket) => {
                let mut out = BytesMut::new();
                reply.write(&mut out, method, keep_alive);
                socket.write_all(&out).await
            }
        }
    }
}
