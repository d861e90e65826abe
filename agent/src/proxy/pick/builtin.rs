//! Picks without an EPP.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName};
use penstock_proto::ext_proc::HeaderMutation;
use tokio::time::Instant;

use crate::{
    error::Error,
    picker::{builtin::SessionHash, exchange::Body},
    proxy::{picked::Picked, request::Request},
    upload::Upload,
    worker::Worker,
};

/// Asks the built-in picker.
pub(super) fn builtin(worker: &Worker, request: &Request, upload: &mut Upload) -> Result<Picked, Error> {
    let (pool, now) = (request.pool, Instant::now().into_std());
    let subset = worker.shared.endpoints[pool].subset(now);
    let names = &worker.shared.config.pools[pool].session_headers;
    let prompt = upload.prompt().with_session(session(names, &request.parts.headers));
    let pick = worker.shared.pickers[pool].pick(&prompt, subset.as_deref(), now)?;
    Ok(without_epp(pick.endpoints))
}

/// The session's hash, from the first of these headers that is present and not empty.
fn session(names: &[HeaderName], headers: &HeaderMap) -> Option<SessionHash> {
    let name = names.iter().filter_map(|name| headers.get(name)).find(|name| !name.is_empty())?;
    Some(SessionHash::new(name.as_bytes()))
}

pub(super) fn without_epp(endpoints: Vec<SocketAddr>) -> Picked {
    let (mutation, body) = (HeaderMutation::default(), Body::Original);
    Picked { endpoints, mutation, body, reusable: true, by_epp: false, stream: None, _open: None }
}
