//! One HTTP/2 stream: reads a request and sends the response of its plan.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Shared, grpc};
use crate::content::Fnv;
use crate::http2_client::{pairs, send};
use crate::model_server::{Echo, FaultKind, Framing, Plan, Sequence};
use crate::random::Random;

/// Why a response is incomplete.
pub(super) enum Stop {
    /// The peer reset it or is gone.
    Peer,
    /// The plan breaks it off.
    Reset,
    /// The plan breaks off the whole connection.
    Close,
}

impl From<h2::Error> for Stop {
    fn from(_: h2::Error) -> Self {
        Self::Peer
    }
}

/// State of a stream while it is served.
pub(super) struct Exchange {
    pub(super) shared: Arc<Shared>,
    pub(super) echo: Echo,
    pub(super) body: Vec<u8>,
    respond: SendResponse<Bytes>,
}

struct Open<'a>(&'a Shared);

impl<'a> Open<'a> {
    fn new(shared: &'a Shared) -> Self {
        let now = shared.streams.fetch_add(1, Ordering::Relaxed) + 1;
        shared.most_streams.fetch_max(now, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) async fn serve(
    shared: Arc<Shared>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    count: u64,
    close: watch::Sender<bool>,
) {
    let open = Arc::clone(&shared);
    let _open = Open::new(&open);
    let Ok((echo, body)) = read(request, count).await else {
        shared.uploads_broken.fetch_add(1, Ordering::Relaxed);
        return;
    };
    shared.seen.lock().push(echo.clone());
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let mut exchange = Exchange { shared: Arc::clone(&shared), echo, body, respond };
    match exchange.answer().await {
        Ok(()) => {}
        Err(Stop::Peer) => drop(shared.aborted.fetch_add(1, Ordering::Relaxed)),
        Err(Stop::Reset) => exchange.respond.send_reset(Reason::INTERNAL_ERROR),
        Err(Stop::Close) => drop(close.send(true)),
    }
}

/// Reads the whole request.
async fn read(request: Request<RecvStream>, count: u64) -> Result<(Echo, Vec<u8>), h2::Error> {
    let (head, mut from) = request.into_parts();
    let mut headers = Vec::new();
    if let Some(authority) = head.uri.authority() {
        headers.push((":authority".to_owned(), authority.to_string()));
    }
    if let Some(scheme) = head.uri.scheme_str() {
        headers.push((":scheme".to_owned(), scheme.to_owned()));
    }
    headers.extend(pairs(&head.headers));
    let framing = match (from.is_end_stream(), head.headers.contains_key(http::header::CONTENT_LENGTH)) {
        (true, _) => "none",
        (false, true) => "content-length",
        (false, false) => "frames",
    };
    let (mut body, mut hash, mut length) = (Vec::new(), Fnv::default(), 0);
    let keep = is_grpc(&head.headers);
    while let Some(data) = from.data().await {
        let data = data?;
        from.flow_control().release_capacity(data.len())?;
        hash.update(&data);
        length += data.len() as u64;
        if keep {
            body.extend_from_slice(&data);
        }
    }
    let trailers = from.trailers().await?.as_ref().map(pairs).unwrap_or_default();
    let echo = Echo {
        method: head.method.to_string(),
        target: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        headers,
        body_framing: framing.to_owned(),
        body_length: length,
        body_hash: hash.value(),
        trailers,
        count,
    };
    Ok((echo, body))
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// The fields of a map, which must be valid: they are the test's own.
pub(super) fn map(fields: &[(String, String)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("the plan has an invalid name");
        map.append(name, HeaderValue::from_bytes(value.as_bytes()).expect("the plan has an invalid value"));
    }
    map
}

impl Exchange {
    async fn answer(&mut self) -> Result<(), Stop> {
        if let Some(plan) = self.echo.header("x-test-plan") {
            return match serde_json::from_str::<Plan>(plan) {
                Ok(plan) => self.planned(&plan).await,
                Err(error) => self.whole(400, "text/plain", error.to_string()).await,
            };
        }
        if self.echo.header("content-type").is_some_and(|kind| kind.starts_with("application/grpc")) {
            return grpc::answer(self).await;
        }
        match self.echo.target.split('?').next().unwrap_or_default() {
            "/test/echo" => self.whole(200, "application/json", serde_json::json!(self.echo).to_string()).await,
            "/test/body" => self.planned(&Plan::default()).await,
            _ => self.whole(404, "text/plain", "unknown path".to_owned()).await,
        }
    }

    /// Sends a head, which ends the stream or returns the handle for its body.
    pub(super) fn head(
        &mut self,
        status: u16,
        fields: &[(String, String)],
        ends: bool,
    ) -> Result<SendStream<Bytes>, Stop> {
        let mut head = Response::new(());
        *head.status_mut() = http::StatusCode::from_u16(status).expect("the plan has an invalid status");
        let served_by = HeaderValue::from_str(&self.shared.addr.to_string()).expect("an address");
        head.headers_mut().insert("x-served-by", served_by);
        head.headers_mut().insert("x-request-count", self.echo.count.into());
        head.headers_mut().extend(map(fields));
        Ok(self.respond.send_response(head, ends)?)
    }

    async fn whole(&mut self, status: u16, kind: &str, body: String) -> Result<(), Stop> {
        let fields = [("content-type", kind.to_owned()), ("content-length", body.len().to_string())];
        let fields = fields.map(|(name, value)| (name.to_owned(), value));
        let mut out = self.head(status, &fields, body.is_empty())?;
        if body.is_empty() { Ok(()) } else { self.write(&mut out, body.into(), true).await }
    }

    /// Sends a piece in one DATA frame, if the window allows.
    pub(super) async fn write(&self, out: &mut SendStream<Bytes>, piece: Bytes, ends: bool) -> Result<(), Stop> {
        let length = piece.len() as u64;
        send(out, piece, ends).await?;
        self.shared.written.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    async fn planned(&mut self, plan: &Plan) -> Result<(), Stop> {
        let mut fields = Vec::new();
        let given = |name: &str| plan.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
        if plan.framing != Framing::None && !given("content-type") {
            fields.push(("content-type".to_owned(), "application/octet-stream".to_owned()));
        }
        if plan.framing == Framing::ContentLength {
            let length = plan.size.saturating_add_signed(plan.length_error);
            fields.push(("content-length".to_owned(), length.to_string()));
        }
        fields.extend_from_slice(&plan.headers);
        for status in &plan.interim {
            let mut head = Response::new(());
            *head.status_mut() = http::StatusCode::from_u16(*status).expect("the plan has an invalid status");
            self.respond.send_informational(head)?;
        }
        let pause = Duration::from_micros(plan.head.pause_us);
        if plan.head.split_at.is_some() {
            self.pause(None, pause).await?;
        }
        let bodiless = self.echo.method == "HEAD" || plan.framing == Framing::None;
        if bodiless && plan.trailers.is_empty() {
            return self.head(plan.status, &fields, true).map(drop);
        }
        let mut out = self.head(plan.status, &fields, false)?;
        self.pause(Some(&mut out), pause).await?;
        if !bodiless {
            self.body(plan, &mut out).await?;
        }
        match plan.trailers.as_slice() {
            [] => Ok(out.send_data(Bytes::new(), true)?),
            trailers => Ok(out.send_trailers(map(trailers))?),
        }
    }

    async fn body(&mut self, plan: &Plan, out: &mut SendStream<Bytes>) -> Result<(), Stop> {
        let mut sizes = Sequence::new(plan.chunks);
        let mut random = plan.pauses.map(|pauses| Random::new(pauses.seed));
        let (mut at, mut frames) = (0, 0_u64);
        let mut fault = plan.fault;
        loop {
            if let Some(due) = fault.take_if(|fault| fault.after == at) {
                match due.kind {
                    FaultKind::Stall => self.wait(Some(out), std::future::pending()).await?,
                    FaultKind::UntilTold => self.until_told(out).await?,
                    FaultKind::StallMs(ms) => self.pause(Some(out), Duration::from_millis(ms)).await?,
                    FaultKind::Reset => return Err(Stop::Reset),
                    FaultKind::ResetWhenTold => {
                        self.until_told(out).await?;
                        return Err(Stop::Reset);
                    }
                    FaultKind::Close => return Err(Stop::Close),
                }
            }
            if at == plan.size {
                return Ok(());
            }
            let until = fault.map_or(plan.size, |fault| fault.after.min(plan.size));
            let size = sizes.next().min(until - at);
            let length = usize::try_from(size).expect("the frame exceeds memory");
            self.write(out, plan.alphabet.bytes(plan.stream_id, at, length).into(), false).await?;
            at += size;
            frames += 1;
            if let (Some(pauses), Some(random)) = (plan.pauses, &mut random)
                && frames.is_multiple_of(pauses.every.max(1))
            {
                let pause = Duration::from_micros(random.below(pauses.up_to_us.saturating_add(1)));
                self.pause(Some(out), pause).await?;
            }
        }
    }

    pub(super) async fn pause(&mut self, out: Option<&mut SendStream<Bytes>>, duration: Duration) -> Result<(), Stop> {
        self.wait(out, sleep(duration)).await
    }

    /// Waits for [`Http2Server::resume`](super::Http2Server::resume).
    async fn until_told(&mut self, out: &mut SendStream<Bytes>) -> Result<(), Stop> {
        let mut told = self.shared.told.subscribe();
        let wait = async {
            // Fails when the server stops, which also ends its connections.
            let _ = told.wait_for(|told| *told).await;
        };
        self.wait(Some(out), wait).await
    }

    /// Waits for `event`, and notices a reset by the peer. `out` is set once the head is sent.
    async fn wait(&mut self, out: Option<&mut SendStream<Bytes>>, event: impl Future<Output = ()>) -> Result<(), Stop> {
        let respond = &mut self.respond;
        let leave = async {
            match out {
                Some(out) => poll_fn(|context| out.poll_reset(context)).await,
                None => poll_fn(|context| respond.poll_reset(context)).await,
            }
        };
        tokio::select! {
            biased;
            _ = leave => Err(Stop::Peer),
            () = event => Ok(()),
        }
    }
}
