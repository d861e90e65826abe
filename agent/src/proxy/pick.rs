//! Picks endpoints for a request: from a lease, from the EPP while the body uploads, or from the built-in picker. If the EPP
//! fails, the pool's failure mode decides. Invariant: a pick comes with the whole body ([`CompleteBody`](crate::upload::CompleteBody)), so failing open loses nothing.

mod short;
mod ask;
mod builtin;
mod epp;
mod failure_mode;
mod wait;

use std::net::SocketAddr;

use http::{Method, header, request};
use tokio::time::Instant;

use self::{
    builtin::{builtin, without_epp},
    epp::Attempt,
};
use super::{
    lease::Lease,
    picked::{PickOutcome, Picked},
    request::Request,
};
use crate::{client::Client, config, error::Error, upload::Upload, worker::Worker};

pub(super) async fn pick(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    held: &mut Option<Lease>,
) -> Result<PickOutcome, Error> {
    if let Some(endpoints) = held.as_mut().and_then(|lease| lease.take(worker, request.pool)) {
        let body = upload.complete(client).await?;
        let by_epp = worker.epps[request.pool].is_some();
        return Ok(PickOutcome::Forward(Box::new(Picked { by_epp, ..without_epp(endpoints) }), body));
    }
    let pool = &worker.shared.config.pools[request.pool];
    let (Some(epp), config::Picker::Epp(settings)) = (&worker.epps[request.pool], &pool.picker) else {
        *held = None;
        let body = upload.complete(client).await?;
        return builtin(worker, request, upload).map(|picked| PickOutcome::Forward(Box::new(picked), body));
    };
    if is_preflight(&request.parts)
        && let Ok(picked) = builtin(worker, request, upload)
    {
        let body = upload.complete(client).await?;
        return Ok(PickOutcome::Forward(Box::new(Picked { reusable: false, ..picked }), body));
    }
    *held = None;
    let attempt = Attempt::new(worker, request.pool, epp, settings, &[]);
    match attempt.pick(client, request, upload, held).await? {
        Ok(outcome) => Ok(outcome),
        Err(failure) => failure_mode::apply(&attempt, failure, client, request, upload).await,
    }
}

/// Asks the EPP once more about a request that none of the endpoints in `dead` has taken, with a hint that lacks them. Returns
/// `None` if there is no other endpoint, or if the EPP picks only those again. The EPP must have closed its earlier stream.
pub(super) async fn pick_again(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    held: &mut Option<Lease>,
    dead: &[SocketAddr],
) -> Result<Option<PickOutcome>, Error> {
    *held = None;
    let pool = &worker.shared.config.pools[request.pool];
    let (Some(epp), config::Picker::Epp(settings)) = (&worker.epps[request.pool], &pool.picker) else {
        return Ok(None);
    };
    let metrics = worker.shared.metrics.pool(request.pool);
    if worker.shared.endpoints[request.pool].hint_without(dead, Instant::now().into_std()).is_none() {
        metrics.epp_repicked("none_left");
        return Ok(None);
    }
    let attempt = Attempt::new(worker, request.pool, epp, settings, dead);
    match attempt.pick(client, request, upload, held).await? {
        Ok(PickOutcome::Forward(mut picked, body)) => {
            picked.endpoints.retain(|address| !dead.contains(address));
            if !picked.endpoints.is_empty() {
                return Ok(Some(PickOutcome::Forward(picked, body)));
            }
            *held = None;
            metrics.epp_repicked("ignored");
            upload.during(client, picked.end()).await?;
            Ok(None)
        }
        Ok(reply) => {
            metrics.epp_repicked("replied");
            Ok(Some(reply))
        }
        Err(failure) => {
            metrics.epp_repicked("picker_failed");
            failure_mode::apply(&attempt, failure, client, request, upload).await.map(Some)
        }
    }
}

/// Whether this is a CORS preflight or `OPTIONS *`. Any endpoint can answer it, so the EPP, which may be down, is not asked.
fn is_preflight(request: &request::Parts) -> bool {
    let names_method = || request.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    request.method == Method::OPTIONS
        && (request.uri.path() == "*" || (request.headers.contains_key(header::ORIGIN) && names_method()))
}
