//! Picks endpoints for a request: from a lease, from the EPP while the body uploads, or from the built-in picker. If the EPP
//! fails, the pool's failure mode decides. Invariant: the whole body is received before dispatch, so failing open loses nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, Method, header, request};
use penstock_proto::ext_proc::HeaderMutation;
use tokio::time::{Instant, timeout};

use super::{
    Lease, Request,
    ask::{Asked, Question},
    lease,
};
use crate::{
    client::Client,
    config::{self, FailureMode, PickPer},
    error::Error,
    http::body::BodyError,
    metrics::{EppOutcome, InFlight},
    picker::{
        builtin::SessionHash,
        client::PickStream,
        error::PickError,
        exchange::{Body, Decision, ExchangeLimits, ImmediateReply, Outcome},
    },
    text::{PHRASE, cut},
    upload::Upload,
    worker::Worker,
};

/// How long to wait for the rest of a request's body that is answered 503 anyway, to probe a stalled EPP with it.
const PROBE_BODY: Duration = Duration::from_secs(2);

pub(super) struct Picked {
    /// In the order in which they are tried. Never empty.
    pub(super) endpoints: Vec<SocketAddr>,
    pub(super) mutation: HeaderMutation,
    pub(super) body: Body,
    /// Whether the pick may also be used for later requests of the connection, if the pool allows that.
    pub(super) reusable: bool,
    /// The EPP's stream, which lives as long as the response.
    pub(super) stream: Option<PickStream>,
    /// Counts the stream in the metrics while it is open.
    pub(super) _open: Option<InFlight>,
}

pub(super) enum PickOutcome {
    Forward(Box<Picked>),
    /// The EPP's immediate reply.
    Reply(ImmediateReply),
}

pub(super) async fn pick(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    held: &mut Option<Lease>,
) -> Result<PickOutcome, Error> {
    if let Some(endpoints) = held.as_mut().and_then(|lease| lease.take(worker, request.pool)) {
        upload.rest(client).await?;
        return Ok(PickOutcome::Forward(Box::new(without_epp(endpoints))));
    }
    let pool = &worker.shared.config.pools[request.pool];
    let (Some(epp), config::Picker::Epp(settings)) = (&worker.epps[request.pool], &pool.picker) else {
        *held = None;
        upload.rest(client).await?;
        return builtin(worker, request, upload).map(|picked| PickOutcome::Forward(Box::new(picked)));
    };
    if is_preflight(&request.parts)
        && let Ok(picked) = builtin(worker, request, upload)
    {
        upload.rest(client).await?;
        return Ok(PickOutcome::Forward(Box::new(Picked { reusable: false, ..picked })));
    }
    *held = None;
    let started = Instant::now();
    let metrics = worker.shared.metrics.pool(request.pool);
    let open = worker.shared.metrics.epp_stream();
    let subset = worker.shared.endpoints[request.pool].subset(started.into_std());
    let limit = worker.shared.config.limits.body_bytes;
    let memory = Arc::clone(&worker.shared.bodies.memory);
    let limits = ExchangeLimits { replaced_body: limit.try_into().unwrap_or(usize::MAX), memory, epp: settings.limits };
    let members = worker.shared.endpoints[request.pool].snapshot();
    let question = Question { epp, settings, subset: subset.as_deref(), limits, members, metrics };
    let failure = match question.ask(client, request, upload).await {
        Asked::Answered(Outcome::Immediate(reply), _) => {
            metrics.epp_exchange(EppOutcome::Immediate, started.elapsed());
            return Ok(PickOutcome::Reply(reply));
        }
        Asked::Answered(Outcome::Picked(decision), stream) => match admitted(worker, request.pool, decision) {
            Ok((endpoints, mut decision)) => {
                metrics.epp_exchange(EppOutcome::Picked, started.elapsed());
                if subset.as_deref().is_some_and(|subset| !subset.contains(&decision.endpoints[0])) {
                    metrics.epp_outside_subset();
                }
                request.record.picked_in(started.elapsed());
                upload.rest(client).await?;
                question.probe(question.probes(), request, upload).await?;
                decision.body = final_body(worker, upload, decision.body).await?;
                let reusable = lease::is_reusable(worker, request.pool, &decision, &request.parts, upload.kept.len());
                if reusable {
                    *held = Lease::new(worker, request.pool, &endpoints);
                }
                let Decision { mutation, body, .. } = decision;
                let picked = Picked { endpoints, mutation, body, reusable, stream: Some(*stream), _open: Some(open) };
                return Ok(PickOutcome::Forward(Box::new(picked)));
            }
            Err(stranger) => Error::Stranger(stranger),
        },
        Asked::Failed(error) => Error::Picker(error),
        Asked::Client(error) => return Err(error),
    };
    metrics.epp_failed(match &failure {
        Error::Picker(error) => error.reason(),
        other => other.reason(),
    });
    let error = failure.to_string();
    tracing::warn!(
        pool = pool.name,
        mode = ?pool.failure_mode,
        error = %cut(&error, PHRASE),
        "EPP failed, applying the failure mode"
    );
    // Probe only after an immediate failure: a request that timed out at the EPP is not delayed further.
    let probes = match failure {
        Error::Picker(PickError::Stalled) => question.probes(),
        _ => Vec::new(),
    };
    // An EPP that decides other requests holds this one back on purpose.
    let held = matches!(failure, Error::Picker(PickError::Held)) && !settings.open_on_deadline;
    match pool.failure_mode {
        _ if held => {
            metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
            Err(failure)
        }
        FailureMode::Closed => {
            if !probes.is_empty() && matches!(timeout(PROBE_BODY, upload.rest(client)).await, Ok(Ok(()))) {
                question.probe(probes, request, upload).await?;
            }
            metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
            Err(failure)
        }
        FailureMode::Open => {
            metrics.epp_exchange(EppOutcome::FailOpen, started.elapsed());
            upload.rest(client).await?;
            question.probe(probes, request, upload).await?;
            let picked = open_pick(worker, pool, request, upload)?;
            if pool.pick_per != PickPer::Request {
                metrics.pick_not_held("fail_open");
            }
            Ok(PickOutcome::Forward(Box::new(Picked { reusable: false, ..picked })))
        }
    }
}

/// The body to send to the endpoint. If the EPP returned the client's body unchanged, as most do, the client's is used and the
/// copy is dropped. A replacement for which there was no memory does not count as a failure of the EPP: failing open with the
/// client's body would send a different request.
async fn final_body(worker: &Worker, upload: &Upload, body: Body) -> Result<Body, Error> {
    let same = match &body {
        Body::Original => true,
        Body::Replaced(pieces) => upload.kept.is_same(pieces).await?,
        Body::DigestOnly(digest) => upload.kept.sha256().await? == *digest,
    };
    match body {
        _ if same => Ok(Body::Original),
        Body::DigestOnly(_) => {
            worker.shared.bodies.refused("memory");
            Err(BodyError::Full { at: "in memory, where bodies that an EPP replaced are kept" }.into())
        }
        body => Ok(body),
    }
}

/// Filters the EPP's endpoints to those that may be dialled: endpoints of the pool that do not drain, and any address with
/// `passthrough`. Avoided endpoints come last. Returns the first address as the error if none is left.
fn admitted(worker: &Worker, pool: usize, decision: Decision) -> Result<(Vec<SocketAddr>, Decision), SocketAddr> {
    let admits = |address: &SocketAddr| worker.shared.admits(pool, *address);
    let mut endpoints: Vec<_> = decision.endpoints.iter().copied().filter(admits).collect();
    let (invalid, strangers) = (decision.invalid.count, decision.endpoints.len() - endpoints.len());
    if invalid + strangers > 0 {
        let metrics = worker.shared.metrics.pool(pool);
        metrics.epp_passed_over("invalid", invalid);
        metrics.epp_passed_over("not_admitted", strangers);
        let name = &worker.shared.config.pools[pool].name;
        tracing::warn!(
            pool = name,
            invalid,
            entries = decision.invalid.shown,
            not_admitted = strangers,
            "EPP picked unusable endpoints, skipping them"
        );
    }
    worker.shared.endpoints[pool].avoided_last(&mut endpoints, Instant::now().into_std());
    match decision.endpoints.first() {
        Some(&stranger) if endpoints.is_empty() => Err(stranger),
        _ => Ok((endpoints, decision)),
    }
}

/// Whether this is a CORS preflight or `OPTIONS *`. Any endpoint can answer it, so the EPP, which may be down, is not asked.
fn is_preflight(request: &request::Parts) -> bool {
    let names_method = || request.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    request.method == Method::OPTIONS
        && (request.uri.path() == "*" || (request.headers.contains_key(header::ORIGIN) && names_method()))
}

fn builtin(worker: &Worker, request: &Request, upload: &mut Upload) -> Result<Picked, Error> {
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

fn open_pick(worker: &Worker, pool: &config::Pool, request: &Request, upload: &mut Upload) -> Result<Picked, Error> {
    let endpoints = worker.shared.endpoints[request.pool].snapshot();
    let takes_requests = |upstream: &SocketAddr| endpoints.get(*upstream).is_none_or(|endpoint| !endpoint.draining);
    match pool.default_upstream.filter(takes_requests) {
        Some(upstream) => Ok(without_epp(vec![upstream])),
        None => builtin(worker, request, upload),
    }
}

fn without_epp(endpoints: Vec<SocketAddr>) -> Picked {
    let (mutation, body) = (HeaderMutation::default(), Body::Original);
    Picked { endpoints, mutation, body, reusable: true, stream: None, _open: None }
}
