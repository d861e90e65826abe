//! hyper's server and client on bytes in memory, polled without a runtime.

use std::{
    cell::RefCell,
    convert::Infallible,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::Incoming,
    client::conn::http1 as client,
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1 as server,
    service::service_fn,
};

use super::{Message, fields};

/// Polls of a future before it counts as stuck.
const MOST_TURNS: usize = 10_000;

/// A connection whose peer sends these bytes, then closes, and ignores what it receives.
struct Wire {
    bytes: Bytes,
    /// No byte arrives before the first write: hyper's client rejects bytes before its request.
    waits: bool,
}

impl Read for Wire {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.waits {
            return Poll::Pending;
        }
        let length = buf.remaining().min(self.bytes.len());
        buf.put_slice(&self.bytes.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.waits = false;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The requests that hyper's server finds in `wire`, up to the first one that it refuses.
pub fn requests(wire: &[u8]) -> Vec<Message> {
    let found = Rc::new(RefCell::new(Vec::new()));
    let service = service_fn(|request: Request<Incoming>| {
        let found = Rc::clone(&found);
        async move {
            let (parts, body) = request.into_parts();
            if let Ok(body) = body.collect().await {
                found.borrow_mut().push(Message {
                    start: parts.method.to_string(),
                    target: parts.uri.to_string(),
                    fields: fields(&parts.headers),
                    body: body.to_bytes().to_vec(),
                });
            }
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let io = Wire { bytes: Bytes::copy_from_slice(wire), waits: false };
    let connection = server::Builder::new()
        .header_read_timeout(None)
        .half_close(true)
        .max_headers(128)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    drive(|cx| connection.as_mut().poll(cx).is_ready());
    found.take()
}

/// The response to a request with `method` that hyper's client finds at the start of `wire`.
pub fn response(method: &Method, wire: &[u8]) -> Option<Message> {
    let io = Wire { bytes: Bytes::copy_from_slice(wire), waits: true };
    let mut exchange = std::pin::pin!(async {
        let (mut sender, connection) =
            client::Builder::new().max_headers(128).handshake::<_, Empty<Bytes>>(io).await.ok()?;
        let request = Request::builder().method(method).uri("/").header("host", "a").body(Empty::new()).ok()?;
        let answer = async {
            let (parts, body) = sender.send_request(request).await.ok()?.into_parts();
            let body = body.collect().await.ok()?.to_bytes().to_vec();
            let start = parts.status.as_str().to_owned();
            Some(Message { start, target: String::new(), fields: fields(&parts.headers), body })
        };
        futures_util::future::join(answer, connection).await.0
    });
    let mut found = None;
    drive(|cx| match exchange.as_mut().poll(cx) {
        Poll::Ready(message) => {
            found = message;
            true
        }
        Poll::Pending => false,
    });
    found
}

/// Polls until `turn` returns true. Everything is in memory, so a future that is pending after many turns never completes.
fn drive(mut turn: impl FnMut(&mut Context<'_>) -> bool) {
    let mut cx = Context::from_waker(Waker::noop());
    let _ = (0..MOST_TURNS).any(|_| turn(&mut cx));
}
