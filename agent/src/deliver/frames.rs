//! Delivers a response if one side or both speak HTTP/2: payload and trailers, piece by piece, in user space.
//!
//! An HTTP/2 client has already got the response head; for an HTTP/1.1 client it is the lead. A truncated response is never ended:
//! the caller aborts the client's side.

use std::{cell::RefCell, pin::pin, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::HeaderMap;

use super::{End, keepalive::SseKeepalive, written};
use crate::{
    client::Client,
    deadline,
    endpoint::body::{Piece, ResponseBody},
    http::fields,
    kernel::socket::monotonic_ns,
    rename::Rename,
    steer::account::Account,
    tee::Tee,
};

/// The framing of the body for an HTTP/1.1 client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameCoding {
    /// Without framing: Content-Length or the close ends the body.
    Plain,
    Chunked,
}

/// The client's side: where the payload and the trailers of a response go.
pub struct Sink<'a> {
    pub client: &'a mut Client,
    /// The response head for an HTTP/1.1 client. It is written at once, because the body's first byte may take long.
    pub lead: BytesMut,
    pub coding: FrameCoding,
}

impl Sink<'_> {
    /// Writes the head for an HTTP/1.1 client.
    pub async fn begin(&mut self) -> Result<(), End> {
        let Client::Http1(socket) = &mut *self.client else { return Ok(()) };
        let head = std::mem::take(&mut self.lead);
        written(socket.write_all(&head).await)
    }

    /// Sends payload to the client. An empty chunk would end the body.
    pub async fn data(&mut self, data: Bytes) -> Result<(), End> {
        if data.is_empty() {
            return Ok(());
        }
        match self.client {
            Client::Http2(stream) => written(stream.data(data).await),
            Client::Http1(socket) => {
                let mut out = BytesMut::new();
                match self.coding {
                    FrameCoding::Plain => out.put_slice(&data),
                    FrameCoding::Chunked => {
                        out.put_slice(format!("{:x}\r\n", data.len()).as_bytes());
                        out.put_slice(&data);
                        out.put_slice(b"\r\n");
                    }
                }
                written(socket.write_all(&out).await)
            }
        }
    }

    /// Ends the body.
    pub async fn end(&mut self, mut trailers: HeaderMap) -> Result<(), End> {
        fields::filter_trailers(&mut trailers);
        match self.client {
            Client::Http2(stream) => written(stream.end(trailers).await),
            Client::Http1(socket) => {
                let mut out = std::mem::take(&mut self.lead);
                if self.coding == FrameCoding::Chunked {
                    out.put_slice(b"0\r\n");
                    for (name, value) in &trailers {
                        out.put_slice(name.as_str().as_bytes());
                        out.put_slice(b": ");
                        out.put_slice(value.as_bytes());
                        out.put_slice(b"\r\n");
                    }
                    out.put_slice(b"\r\n");
                }
                if out.is_empty() { Ok(()) } else { written(socket.write_all(&out).await) }
            }
        }
    }
}

pub struct Frames<'a> {
    pub to: Sink<'a>,
    pub body: &'a mut ResponseBody,
    pub tee: Option<&'a RefCell<Tee>>,
    pub idle: Option<Duration>,
    pub account: Account,
    /// Changes what the client gets.
    pub rename: Option<Rename>,
    /// Sends comments of an event stream while nothing comes.
    pub keepalive: Option<SseKeepalive>,
}

impl Frames<'_> {
    /// Delivers the whole body.
    pub async fn run(&mut self) -> End {
        let mut trailers = BytesMut::new();
        // Together with the end of a response without a body.
        if !self.body.is_done()
            && let Err(end) = self.to.begin().await
        {
            return end;
        }
        let mut idle = pin!(deadline::elapsed(self.idle));
        loop {
            let keepalive = self.keepalive.as_ref();
            let due = async {
                match keepalive {
                    Some(keepalive) => keepalive.due().await,
                    None => std::future::pending().await,
                }
            };
            let piece = tokio::select! {
                biased;
                piece = self.body.next(&mut trailers) => piece,
                () = self.to.client.gone() => return End::ClientGone,
                () = idle.as_mut() => return End::Idle,
                comment = due => match self.comment(comment).await {
                    // The endpoint has sent nothing: its time goes on.
                    Ok(()) => continue,
                    Err(end) => return end,
                },
            };
            idle.set(deadline::elapsed(self.idle));
            let step = match piece {
                Ok(Piece::Data(data)) => self.received(data).await,
                Ok(Piece::End(trailers)) => match self.end(trailers).await {
                    Ok(()) => return End::Complete { reusable: self.body.is_reusable() },
                    Err(end) => Err(end),
                },
                Err(error) => {
                    tracing::debug!(%error, "endpoint aborted its response");
                    Err(End::Broken)
                }
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Takes a piece of the endpoint's body.
    async fn received(&mut self, data: Bytes) -> Result<(), End> {
        if let Some(tee) = self.tee {
            tee.borrow_mut().take(&data);
        }
        let now = monotonic_ns();
        self.account.stamp(now, now);
        self.account.add_relayed(data.len());
        let data = match &mut self.rename {
            None => data,
            Some(rename) => rename.feed(&data),
        };
        self.send(data).await
    }

    /// Sends a piece to the client.
    async fn send(&mut self, data: Bytes) -> Result<(), End> {
        let data = match &mut self.keepalive {
            Some(keepalive) => {
                let data = keepalive.take(data);
                keepalive.sent(&data);
                data
            }
            None => data,
        };
        self.to.data(data).await
    }

    async fn comment(&mut self, comment: Bytes) -> Result<(), End> {
        if let Some(keepalive) = &mut self.keepalive {
            keepalive.commented();
        }
        self.to.data(comment).await
    }

    async fn end(&mut self, trailers: HeaderMap) -> Result<(), End> {
        if let Some(rename) = &mut self.rename {
            let rest = rename.end();
            self.send(rest).await?;
        }
        if let Some(rest) = self.keepalive.as_mut().map(SseKeepalive::rest) {
            self.to.data(rest).await?;
        }
        self.to.end(trailers).await
    }
}
