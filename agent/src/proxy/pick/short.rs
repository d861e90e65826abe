//! What an EPP gets of a request with a long body, if its pool has `body_to_picker = "abridged"`, and what its answer means for the
//! client's body.

use bytes::Bytes;
use http::{HeaderValue, header, request};
use ring::digest::{SHA256, digest};
use tokio::time::Instant;

use crate::{
    abridge::{Abridged, Abridger, Difference, ModelValue, Renamed, Whole, difference},
    budget::Bodies,
    client::Client,
    config::{self, BodyToPicker},
    error::Error,
    http::{digest as digests, fields::X_PENSTOCK_BODY_LENGTH, media::is_coded},
    picker::exchange::Body,
    proxy::request::Request,
    upload::Upload,
    worker::Worker,
};

/// How much longer than the abridged body its replacement is compared: each byte may be escaped.
const LONGER: usize = 6;

/// A request as an EPP sees it.
pub(super) struct ShortRequest {
    pub(super) parts: request::Parts,
    /// Counts against the budget of bodies.
    pub(super) body: Bytes,
    model: Option<ModelValue>,
}

/// Receives a long body, and abridges it. Returns `None` if the EPP gets the whole body, which may still be uploading then.
pub(super) async fn short_request(
    worker: &Worker,
    settings: &config::Epp,
    client: &mut Client,
    request: &Request,
    upload: &mut Upload,
) -> Result<Option<ShortRequest>, Error> {
    let limit = settings.body_to_picker_bytes;
    let is_short = |length: u64| length <= limit as u64;
    if settings.body_to_picker == BodyToPicker::Whole {
        return Ok(None);
    }
    let headers = &request.parts.headers;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if !upload.has_body() || length.is_some_and(is_short) {
        return Ok(None);
    }
    let whole = if is_coded(headers) {
        "coded"
    } else if worker.shared.rewriters[request.pool].is_known(Instant::now().into_std()) {
        "rewriter"
    } else {
        match abridged(&worker.shared.bodies, limit, client, upload).await? {
            Ok(_) if is_short(upload.kept.len()) => return Ok(None),
            Ok(abridged) => return Ok(Some(ShortRequest::new(&request.parts, abridged, upload.kept.len()))),
            Err(whole) => whole,
        }
    };
    if !upload.is_done() || !is_short(upload.kept.len()) {
        worker.shared.metrics.pool(request.pool).epp_abridged(whole);
    }
    Ok(None)
}

/// Reads the body and abridges it. The inner error is the metric's label for why not; then the body may be incomplete.
async fn abridged(
    bodies: &Bodies,
    limit: usize,
    client: &mut Client,
    upload: &mut Upload,
) -> Result<Result<Abridged, &'static str>, Error> {
    let (mut abridger, mut share, mut read) = (Abridger::new(limit), bodies.memory.share(), 0);
    loop {
        while let Some(piece) = upload.kept.piece_at(read).await? {
            read += piece.len() as u64;
            let before = abridger.bytes();
            if let Err(whole) = abridger.feed(&piece) {
                return Ok(Err(whole.reason()));
            }
            if !share.grow((abridger.bytes() - before) as u64) {
                return Ok(Err("memory"));
            }
        }
        if upload.is_done() {
            break;
        }
        let piece = upload.read(client).await?;
        upload.take(piece).await?;
    }
    let abridged = abridger.finish().map_err(Whole::reason);
    Ok(abridged.map(|abridged| Abridged { body: share.hold(abridged.body), ..abridged }))
}

impl ShortRequest {
    /// `length` is that of the whole body.
    fn new(parts: &request::Parts, Abridged { body, model }: Abridged, length: u64) -> Self {
        let mut parts = parts.clone();
        digests::remove(&mut parts.headers);
        if parts.headers.contains_key(header::CONTENT_LENGTH) {
            parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        parts.headers.insert(X_PENSTOCK_BODY_LENGTH, HeaderValue::from(length));
        Self { parts, body, model }
    }

    /// The body for the endpoint, if the EPP answered the abridged one with `returned`. Returns `None` if that is another document,
    /// which cannot be applied to the client's body.
    pub(super) fn body_for(&self, returned: &Body) -> Option<Body> {
        let returned = match returned {
            Body::Original => return Some(Body::Original),
            Body::DigestOnly(sum) => {
                return (digest(&SHA256, &self.body).as_ref() == &**sum).then_some(Body::Original);
            }
            Body::Renamed(_) => return None,
            Body::Replaced(pieces) if pieces.iter().map(Bytes::len).sum::<usize>() > LONGER * self.body.len() => {
                return None;
            }
            Body::Replaced(pieces) => pieces.concat(),
        };
        match difference(&self.body, &returned) {
            Difference::None => Some(Body::Original),
            Difference::Model(picker) => {
                let ModelValue { name, at } = self.model.clone()?;
                Some(Body::Renamed(Box::new(Renamed { at, client: name, picker })))
            }
            Difference::Other => None,
        }
    }
}
