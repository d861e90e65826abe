//! Servers that send GOAWAY, written frame by frame, because server libraries do not let a test choose the last stream.

use bytes::{BufMut, BytesMut};
use penstock_proto::ext_proc::ProcessingResponse;
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The server's side of one connection.
struct ServerFrames(TcpStream);

impl ServerFrames {
    async fn accept(listener: &TcpListener) -> Self {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.read_exact(&mut [0; 24]).await.unwrap();
        let mut frames = Self(tcp);
        frames.send(SETTINGS, 0, 0, &[]).await;
        frames
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = BytesMut::new();
        frame.put_uint(payload.len() as u64, 3);
        frame.put_slice(&[kind, flags]);
        frame.put_u32(stream);
        frame.put_slice(payload);
        self.0.write_all(&frame).await.unwrap();
    }

    /// Type, flags and stream of the next frame. Returns `None` if the client has closed.
    async fn next(&mut self) -> Option<(u8, u8, u32)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        self.0.read_exact(&mut vec![0; length as usize]).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some((head[3], head[4], stream))
    }

    /// Waits for the next stream to be opened.
    async fn opened(&mut self) -> u32 {
        loop {
            if let (HEADERS, _, stream) = self.next().await.unwrap() {
                return stream;
            }
        }
    }

    async fn go_away(&mut self, last_stream: u32) {
        let no_error = 0_u32.to_be_bytes();
        self.send(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), no_error].concat()).await;
    }

    /// Picks, and leaves the stream open.
    async fn pick(&mut self, stream: u32) {
        // :status 200 of the static table, and content-type as a literal.
        let mut head = vec![0x88, 0x0f, 0x10, 16];
        head.extend_from_slice(b"application/grpc");
        self.send(HEADERS, END_HEADERS, stream, &head).await;
        let response = Some(Response::RequestHeaders(epp::head(&[(message::DESTINATION, A)])));
        let message = ProcessingResponse { response, ..Default::default() }.encode_to_vec();
        let mut data = BytesMut::new();
        data.put_u8(0);
        data.put_u32(message.len() as u32);
        data.put_slice(&message);
        self.send(DATA, 0, stream, &data).await;
    }
}

/// Opens the connection's first stream, which stays open.
async fn picked_once(client: &EppClient, listener: &TcpListener) -> (PickStream, ServerFrames) {
    let mut stream = open(client, false);
    let server = async {
        let mut frames = ServerFrames::accept(listener).await;
        let opened = frames.opened().await;
        frames.pick(opened).await;
        frames
    };
    let (outcome, frames) = soon(async { tokio::join!(stream.outcome(), server) }).await;
    picked(outcome);
    (stream, frames)
}

/// Streams up to the GOAWAY's last one finish on the old connection. Later ones are retried on a new connection.
#[tokio::test]
async fn goaway_finishes_earlier_streams_and_retries_later_ones() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(listener.local_addr().unwrap());
    let (_warm, mut old) = picked_once(&client, &listener).await;
    let (mut taken, mut left) = (open(&client, false), open(&client, false));
    let server = async {
        let (first, second) = (old.opened().await, old.opened().await);
        assert!(first < second);
        old.go_away(first).await;
        first
    };
    let (error, first) = soon(async { tokio::join!(left.outcome(), server) }).await;
    let error = error.unwrap_err();
    assert_eq!((error.reason(), error.retry()), ("not_taken", AskAgain::SameReplica), "{error}");

    // Meanwhile the earlier stream waits for its pick, and gets it.
    let (mut again, new) = (open(&client, false), ServerFrames::accept(&listener));
    let answered = async {
        let mut new = new.await;
        let stream = new.opened().await;
        new.pick(stream).await;
        old.pick(first).await;
        new
    };
    let (outcomes, mut new) =
        soon(async { tokio::join!(async { (again.outcome().await, taken.outcome().await) }, answered) }).await;
    assert_eq!(picked(outcomes.0).endpoints, addresses(&[A]));
    assert_eq!(picked(outcomes.1).endpoints, addresses(&[A]));

    // The response's head and end, and the half-close, also arrive on the old connection.
    let served = A.parse().unwrap();
    taken.response_headers(StatusCode::OK, &HeaderMap::new(), served, false, None).await;
    taken.finish(Rest::default());
    let ended = async {
        while let Some((kind, flags, stream)) = old.next().await {
            if kind == DATA && flags & END_STREAM != 0 {
                return stream;
            }
        }
        0
    };
    assert_eq!(soon(ended).await, first);
    drop(again);
    // The next stream uses the new connection.
    let _next = open(&client, false);
    soon(new.opened()).await;
}

/// If the server sent GOAWAY on an idle connection, the next stream notices it and is retried.
#[tokio::test]
async fn idle_connection_that_went_away_fails_no_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(listener.local_addr().unwrap());
    let (first, mut old) = picked_once(&client, &listener).await;
    drop(first);
    old.go_away(1).await;
    // hyper closes the connection when its last stream has ended.
    soon(async { while old.next().await.is_some() {} }).await;

    let serve = async {
        let mut new = ServerFrames::accept(&listener).await;
        let stream = new.opened().await;
        new.pick(stream).await;
        new
    };
    let ask = async {
        loop {
            match open(&client, false).outcome().await {
                Err(error) => assert_eq!(error.retry(), AskAgain::SameReplica, "{error}"),
                outcome => return outcome,
            }
        }
    };
    let (outcome, _new) = soon(async { tokio::join!(ask, serve) }).await;
    picked(outcome);
}
