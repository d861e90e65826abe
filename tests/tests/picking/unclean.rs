//! EPPs whose streams end without a gRPC status, or within a message: they have failed, as with any other loss of a stream.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use penstock_agent::config::{FailureMode, ResponseToPicker, SteeringMode};
use penstock_proto::ext_proc::{ProcessingRequest, ProcessingResponse, processing_request::Request as Told};
use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Request, Response, ScriptedEpp,
    agent::{TestAgent, epps_pool},
    http2_frames::{END_STREAM, Frame, Http2Frames, kind},
    model_server::{Framing, Lengths},
    scripted_epp::{Production, reply},
    stage::{echo, epp, json},
};
use prost::Message as _;
use tokio::net::TcpListener;

/// How the EPP ends its side of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Ok,
    /// Trailers with this status.
    Status(&'static str),
    /// Trailers without a status.
    EmptyTrailers,
    /// The last DATA frame ends the stream.
    NoTrailers,
    /// So does a part of a message.
    WithinMessage,
    /// Status OK after a part of a message.
    OkWithinMessage,
    Reset(u32),
}

/// NO_ERROR, INTERNAL_ERROR and CANCEL.
const UNCLEAN: [Ending; 7] = [
    Ending::EmptyTrailers,
    Ending::NoTrailers,
    Ending::WithinMessage,
    Ending::OkWithinMessage,
    Ending::Reset(0),
    Ending::Reset(2),
    Ending::Reset(8),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Instead of the pick.
    Undecided,
    /// After the reply to the head, before that to the body.
    HeadReplied,
    /// After it has answered for a piece of the response's body.
    Answering,
}

/// An EPP written frame by frame.
struct RawEpp {
    addr: SocketAddr,
    /// Streams so far.
    streams: Arc<AtomicUsize>,
}

impl RawEpp {
    async fn start(endpoint: SocketAddr, when: When, ending: Ending) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (addr, streams) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
        let count = Arc::clone(&streams);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    let frames = Http2Frames::accept(tcp).await.unwrap();
                    let mut connection =
                        RawConnection { frames, endpoint, when, ending, buffers: HashMap::new(), streams: count };
                    // Ends when the agent closes.
                    let _ = connection.serve().await;
                });
            }
        });
        Self { addr, streams }
    }
}

struct RawConnection {
    frames: Http2Frames,
    endpoint: SocketAddr,
    when: When,
    ending: Ending,
    /// Bytes of messages, by stream. A stream that this side has ended has none.
    buffers: HashMap<u32, Vec<u8>>,
    streams: Arc<AtomicUsize>,
}

impl RawConnection {
    async fn serve(&mut self) -> anyhow::Result<()> {
        while let Some(frame) = self.frames.next().await? {
            match frame.kind {
                kind::HEADERS => {
                    self.streams.fetch_add(1, Ordering::Relaxed);
                    self.buffers.insert(frame.stream, Vec::new());
                    let head = [(":status", "200"), ("content-type", "application/grpc")];
                    self.frames.send(&Frame::headers(frame.stream, false, &head)).await?;
                }
                kind::DATA => {
                    let Some(buffer) = self.buffers.get_mut(&frame.stream) else { continue };
                    buffer.extend_from_slice(&frame.payload);
                    while let Some(message) = self.message(frame.stream) {
                        self.told(frame.stream, message).await?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn message(&mut self, stream: u32) -> Option<Told> {
        let buffer = self.buffers.get_mut(&stream)?;
        let length = u32::from_be_bytes(buffer.get(1..5)?.try_into().unwrap()) as usize;
        let message = ProcessingRequest::decode(buffer.get(5..5 + length)?).unwrap();
        buffer.drain(..5 + length);
        message.request
    }

    async fn told(&mut self, stream: u32, message: Told) -> anyhow::Result<()> {
        match message {
            Told::RequestHeaders(head) if head.end_of_stream => self.decide(stream).await,
            Told::RequestBody(body) if body.end_of_stream => self.decide(stream).await,
            Told::ResponseHeaders(_) => self.send(stream, &reply::response_headers(&[])).await,
            Told::ResponseBody(body) => {
                self.send(stream, &reply::response_body(body.body, body.end_of_stream)).await?;
                if self.when == When::Answering { self.end(stream).await } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    async fn decide(&mut self, stream: u32) -> anyhow::Result<()> {
        if self.when == When::Undecided {
            return self.end(stream).await;
        }
        self.send(stream, &reply::pick(&self.endpoint.to_string(), &[])).await?;
        if self.when == When::HeadReplied {
            return self.end(stream).await;
        }
        self.send(stream, &reply::request_body_unchanged()).await
    }

    async fn send(&mut self, stream: u32, message: &ProcessingResponse) -> anyhow::Result<()> {
        let message = message.encode_to_vec();
        let length = u32::try_from(message.len())?.to_be_bytes();
        self.frames.send(&Frame::new(kind::DATA, 0, stream, [&[0], &length[..], &message].concat())).await
    }

    async fn end(&mut self, stream: u32) -> anyhow::Result<()> {
        self.buffers.remove(&stream);
        let data = |flags, payload: &[u8]| Frame::new(kind::DATA, flags, stream, payload);
        let part = [0, 0, 0, 0, 9, 1, 2, 3];
        let trailers = |status| Frame::headers(stream, true, &[("grpc-status", status)]);
        match self.ending {
            Ending::Ok => self.frames.send(&trailers("0")).await,
            Ending::Status(status) => self.frames.send(&trailers(status)).await,
            Ending::EmptyTrailers => self.frames.send(&Frame::headers(stream, true, &[("x-other", "1")])).await,
            Ending::NoTrailers => self.frames.send(&data(END_STREAM, &[])).await,
            Ending::WithinMessage => self.frames.send(&data(END_STREAM, &part)).await,
            Ending::OkWithinMessage => {
                self.frames.send(&data(0, &part)).await?;
                self.frames.send(&trailers("0")).await
            }
            Ending::Reset(error) => self.frames.send(&Frame::reset(stream, error)).await,
        }
    }
}

/// The response to a request of an agent whose pool fails closed.
async fn asked(replicas: &[SocketAddr], endpoint: &ModelServer, request: &Request) -> (Response, TestAgent) {
    let pool = epps_pool(&[endpoint.addr], replicas, FailureMode::Closed);
    let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
        config.listen.workers = 1;
        epp(config).response_to_picker = ResponseToPicker::Body;
    });
    let mut client = Client::connect(agent.addr).await.unwrap();
    (client.request(request).await.unwrap(), agent)
}

#[tokio::test]
async fn request_is_asked_of_the_next_replica_after_an_unclean_end() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let good = ScriptedEpp::start(Production::new(&[endpoint.addr])).await.unwrap();
    for ending in UNCLEAN {
        let bad = RawEpp::start(endpoint.addr, When::Undecided, ending).await;
        let (response, agent) = asked(&[bad.addr, good.addr], &endpoint, &echo(json("m", 1000))).await;
        assert_eq!(response.status(), 200, "{ending:?}: {}", response.text());
        assert!(bad.streams.load(Ordering::Relaxed) > 0, "{ending:?}");
        assert!(agent.count("penstock_epp_asked_again_total", &["reason=\"reset\""]) > 0, "{ending:?}");
    }
    // The EPP's own answers.
    for (ending, reason) in [(Ending::Ok, "closed_without_pick"), (Ending::Status("13"), "internal")] {
        let bad = RawEpp::start(endpoint.addr, When::Undecided, ending).await;
        let (response, agent) = asked(&[bad.addr, good.addr], &endpoint, &echo(json("m", 1000))).await;
        assert_eq!((response.status(), response.error_code().as_str()), (503, "picker_failed"), "{ending:?}");
        assert_eq!(agent.count("penstock_epp_failures_total", &[&format!("reason=\"{reason}\"")]), 1, "{ending:?}");
    }
}

/// The client's body is used only if the EPP has left it unchanged, which an unclean end does not say.
#[tokio::test]
async fn unclean_end_before_the_reply_to_the_body_is_no_pick() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    for ending in UNCLEAN.into_iter().chain([Ending::Status("13"), Ending::Ok]) {
        let raw = RawEpp::start(endpoint.addr, When::HeadReplied, ending).await;
        let before = endpoint.requests();
        let (response, _agent) = asked(&[raw.addr], &endpoint, &echo(json("m", 1000))).await;
        let expected = if ending == Ending::Ok { 200 } else { 503 };
        assert_eq!(response.status(), expected, "{ending:?}: {}", response.text());
        assert_eq!(endpoint.requests() - before, u64::from(ending == Ending::Ok), "{ending:?}");
    }
}

/// What the EPP was to answer for does not pass it by.
#[tokio::test]
async fn response_is_broken_off_after_an_unclean_end() {
    let endpoint = ModelServer::start(Default::default()).await.unwrap();
    let plan = Plan {
        size: 300_000,
        framing: Framing::Chunked,
        chunks: Lengths::Fixed(1000),
        headers: vec![("content-type".to_owned(), "text/plain".to_owned())],
        ..Plan::default()
    };
    for ending in UNCLEAN.into_iter().chain([Ending::Status("13"), Ending::Ok]) {
        let raw = RawEpp::start(endpoint.addr, When::Answering, ending).await;
        let pool = epps_pool(&[endpoint.addr], &[raw.addr], FailureMode::Closed);
        let agent = TestAgent::start(pool, SteeringMode::Off, |config| {
            epp(config).response_to_picker = ResponseToPicker::Body;
        });
        let mut client = Client::connect(agent.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        let status = client.head().await.unwrap().status;
        if status == 200 {
            let read = client.read_body(penstock_tests::client::Pace::Fast, |_| Ok(())).await.unwrap();
            assert_eq!(read.end == BodyEnd::Complete, ending == Ending::Ok, "{ending:?}");
        } else {
            assert!(status == 503 && ending != Ending::Ok, "{ending:?}: {status}");
        }
        let unanswered = |how| agent.count("penstock_epp_bodies_unanswered_total", &[&format!("reason=\"{how}\"")]);
        let expected = if ending == Ending::Ok { (1, 0) } else { (0, 1) };
        assert_eq!((unanswered("continued"), unanswered("broken_off")), expected, "{ending:?}");
    }
}
