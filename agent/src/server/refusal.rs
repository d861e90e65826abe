//! Answers clients whose connection finds no room: 503 over HTTP/1.1, GOAWAY over HTTP/2, and a plain close over TLS.

use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::{Method, Version};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    error::{Error, Manner},
    worker::Worker,
};

/// Time limit for a refusal, including the client's request.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of the request that are read, so that the close does not reset the connection before the client reads the
/// answer.
const DISCARD: usize = 64 << 10;

/// The beginning of an HTTP/2 connection (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0";
/// Empty SETTINGS, then GOAWAY with NO_ERROR and last stream 0: nothing was processed and everything can be sent again.
const GO_AWAY: &[u8] = b"\0\0\0\x04\0\0\0\0\0\
                         \0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Reads the beginning of a request and answers it. Takes at most [`PATIENCE`].
pub(super) async fn answer(worker: &Worker, mut stream: TcpStream) {
    let exchange = async {
        let mut request = vec![0; 4096];
        let mut read = stream.read(&mut request).await?;
        if read > 0 {
            stream.write_all(&reply(worker, &request[..read])).await?;
            stream.shutdown().await?;
        }
        while read > 0 && read < DISCARD {
            match stream.read(&mut request).await? {
                0 => break,
                more => read += more,
            }
        }
        std::io::Result::Ok(())
    };
    // A client that does not wait for the answer loses nothing.
    let _ = timeout(PATIENCE, exchange).await;
}

/// Like [`answer`], without waiting.
pub(super) fn answer_at_once(worker: &Worker, stream: &TcpStream) {
    let mut request = [0; 4096];
    let read = stream.try_read(&mut request).unwrap_or_default();
    let _ = stream.try_write(&reply(worker, &request[..read]));
}

/// Counts a refusal.
pub(super) fn count(worker: &Worker, reason: &'static str) {
    let metrics = &worker.shared.metrics;
    metrics.client_refused(reason);
    let error = Error::TooManyConnections;
    metrics.unrouted().request(error.status().as_u16(), error.reason(), Duration::ZERO);
}

fn reply(worker: &Worker, request: &[u8]) -> BytesMut {
    if request.starts_with(PREFACE) {
        return BytesMut::from(GO_AWAY);
    }
    let method = if request.starts_with(b"HEAD ") { Method::HEAD } else { Method::GET };
    let mut out = BytesMut::new();
    Error::TooManyConnections.reply(&Manner::unknown(&worker.shared.config)).write(
        &mut out,
        &method,
        false,
        Version::HTTP_11,
    );
    out
}

/// Limits a log message to one per [`PAUSE`](Self::PAUSE).
#[derive(Default)]
pub(super) struct LogLimit(std::cell::Cell<Option<Instant>>);

impl LogLimit {
    const PAUSE: Duration = Duration::from_secs(10);

    pub(super) fn allows(&self) -> bool {
        let allowed = self.0.get().is_none_or(|last| last.elapsed() >= Self::PAUSE);
        if allowed {
            self.0.set(Some(Instant::now()));
        }
        allowed
    }
}
