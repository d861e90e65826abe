//! One connection to the API server: reads requests and writes answers, whole or as the chunks of a watch.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, sleep_until};

use super::answer::{Answer, GONE, Request, Watch, status};
use super::{News, State};

/// Bytes of a piece of an answer that is sent slowly.
const PIECE: usize = 7;

pub(super) async fn serve(mut stream: TcpStream, state: Arc<State>) {
    let mut read = Vec::new();
    while let Ok(Some(request)) = request(&mut stream, &mut read).await {
        // From before the request counts, so that a cut after that ends the watch.
        let mut news = state.news.subscribe();
        let begun = *news.borrow_and_update();
        state.requests.lock().push(format!("{} {}", request.method, request.target));
        let pace = state.faults.lock().pace;
        sleep(state.delay(&request)).await;
        let mut writer = Writer { stream: &mut stream, pace };
        let written = match state.answer(&request) {
            Answer::Whole(code, body) => writer.whole(code, &body).await,
            Answer::EndedWatch => {
                let head =
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
                writer.bytes(head).await
            }
            Answer::Watch(watch) => writer.watch(watch, &state, begun, news).await,
        };
        if written.is_err() {
            return;
        }
    }
}

/// The next request. None if the client closes.
async fn request(stream: &mut TcpStream, read: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text);
    loop {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut fields);
        let parsed = head.parse(read).map_err(|_| invalid("not a request"))?;
        if let httparse::Status::Complete(length) = parsed {
            let is_length = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case("content-length");
            let body = head.headers.iter().find(is_length).and_then(|field| std::str::from_utf8(field.value).ok());
            let body = body.map_or(Ok(0), str::parse::<usize>).map_err(|_| invalid("not a length"))?;
            if read.len() >= length + body {
                let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
                let (method, target) = (text(head.method), text(head.path));
                let request = Request { method, target, body: read[length..length + body].to_vec() };
                read.drain(..length + body);
                return Ok(Some(request));
            }
        }
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

struct Writer<'s> {
    stream: &'s mut TcpStream,
    pace: Option<Duration>,
}

impl Writer<'_> {
    async fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(pace) = self.pace else { return self.stream.write_all(bytes).await };
        for piece in bytes.chunks(PIECE) {
            self.stream.write_all(piece).await?;
            sleep(pace).await;
        }
        Ok(())
    }

    async fn whole(&mut self, code: u16, body: &Value) -> io::Result<()> {
        let body = body.to_string();
        let length = body.len();
        let head = format!("HTTP/1.1 {code} .\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
        self.bytes(head.as_bytes()).await?;
        self.bytes(body.as_bytes()).await
    }

    async fn event(&mut self, event: &Value) -> io::Result<()> {
        let line = format!("{event}\n");
        self.bytes(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await
    }

    /// Sends events until the watch has lasted its time. Fails if the connection is to be closed.
    async fn watch(
        &mut self,
        mut watch: Watch,
        state: &State,
        begun: News,
        mut news: Receiver<News>,
    ) -> io::Result<()> {
        let end = Instant::now() + watch.lasts;
        let mut bookmarks = begun.bookmarks;
        self.bytes(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n").await?;
        if watch.is_gone {
            self.event(&json!({ "type": "ERROR", "object": status(410, "Expired", GONE) })).await?;
            return self.bytes(b"0\r\n\r\n").await;
        }
        loop {
            if state.faults.lock().silent {
                std::future::pending::<()>().await;
            }
            let (events, version) = state.cluster.lock().events(&watch.selection, watch.version);
            for event in &events {
                self.event(event).await?;
            }
            watch.version = version;
            let now = *news.borrow_and_update();
            if now.cuts > begun.cuts {
                if state.faults.lock().cut_in_line {
                    self.bytes(b"40\r\n{\"type\":\"MODIFIED\",\"object\":{\"metadata\":{\"na").await?;
                }
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if now.bookmarks > bookmarks && watch.bookmarks {
                bookmarks = now.bookmarks;
                let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
                let object = json!({ "kind": "Any", "apiVersion": "v1", "metadata": metadata });
                self.event(&json!({ "type": "BOOKMARK", "object": object })).await?;
            }
            tokio::select! {
                _ = news.changed() => {}
                () = sleep_until(end) => return self.bytes(b"0\r\n\r\n").await,
            }
        }
    }
}
