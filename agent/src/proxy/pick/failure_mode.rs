//! What a pool does after its EPP failed: respond with an error (`closed`), or pick without the EPP (`open`).
//!
//! [`ends_request`] has every failure and says whether the request ends or another endpoint is picked. An EPP's own reply to the
//! client (`ImmediateResponse`) is not a failure and does not get here; how often the EPP is asked again before that is
//! [`PickError::retry`].

use std::{net::SocketAddr, time::Duration};

use tokio::time::timeout;

use super::{
    builtin::{builtin, without_epp},
    epp::Attempt,
};
use crate::{
    client::Client,
    config::{self, FailureMode, PickPer},
    error::Error,
    metrics::EppOutcome,
    picker::error::PickError,
    proxy::{
        picked::{PickOutcome, Picked},
        request::Request,
    },
    text::{PHRASE, cut},
    upload::Upload,
    worker::Worker,
};

/// How long to wait for the rest of a request's body that is answered 503 anyway, to probe a stalled EPP with it.
const PROBE_BODY: Duration = Duration::from_secs(2);

/// How an EPP can fail to pick for a request.
pub(super) enum PickFailure {
    /// The EPP did not pick.
    Epp(PickError),
    /// Every endpoint that the EPP picked is outside of the pool or drains; the first one.
    Stranger(SocketAddr),
}

impl From<PickFailure> for Error {
    fn from(failure: PickFailure) -> Self {
        match failure {
            PickFailure::Epp(error) => Self::Picker(error),
            PickFailure::Stranger(address) => Self::Stranger(address),
        }
    }
}

/// Whether the request is answered with the failure. Otherwise it gets an endpoint that the EPP did not pick.
fn ends_request(failure: &PickFailure, mode: FailureMode, open_on_deadline: bool) -> bool {
    use PickError::*;
    match failure {
        // An EPP that decides other requests holds this one back on purpose.
        PickFailure::Epp(Held) if !open_on_deadline => true,
        PickFailure::Epp(
            // The EPP could not be asked, or the stream was lost.
            Unresolved(_) | NoReplica(_) | Connect(_) | LocalFault(_) | NotTaken(_) | Reset { .. } | Stalled
            // It did not answer in time, or ended the stream instead.
            | Deadline | Held | Status { .. } | ClosedWithoutPick
            // Its answer cannot be used.
            | NoDestination | BadDestination(_) | BodyTooLarge { .. } | BodyPartial | MutationTooLarge { .. }
            | TooManyMessages { .. } | MetadataTooLarge { .. } | UnknownReply | ReplyTooLarge
            // Comes after the pick, so never here.
            | ResponseUnanswered,
        )
        | PickFailure::Stranger(_) => mode == FailureMode::Closed,
    }
}

/// Answers the request with `failure` of its EPP, or picks without the EPP.
pub(super) async fn apply(
    attempt: &Attempt<'_>,
    failure: PickFailure,
    client: &mut Client,
    request: &Request,
    upload: &mut Upload,
) -> Result<PickOutcome, Error> {
    let Attempt { worker, question, started } = attempt;
    let (pool, metrics) = (&worker.shared.config.pools[request.pool], question.metrics);
    // Probe only after an immediate failure: a request that timed out at the EPP is not delayed further.
    let probes = match failure {
        PickFailure::Epp(PickError::Stalled) => question.probes(),
        _ => Vec::new(),
    };
    let ends = ends_request(&failure, pool.failure_mode, question.settings.open_on_deadline);
    let failure = Error::from(failure);
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
    if ends {
        if !probes.is_empty()
            && let Ok(Ok(body)) = timeout(PROBE_BODY, upload.complete(client)).await
        {
            question.probe(probes, request, &body).await?;
        }
        metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
        return Err(failure);
    }
    metrics.epp_exchange(EppOutcome::FailOpen, started.elapsed());
    let body = upload.complete(client).await?;
    question.probe(probes, request, &body).await?;
    let picked = open_pick(worker, pool, request, upload)?;
    if pool.pick_per != PickPer::Request {
        metrics.pick_not_held("fail_open");
    }
    Ok(PickOutcome::Forward(Box::new(Picked { reusable: false, ..picked }), body))
}

/// Picks without the EPP: `default_upstream` unless it drains, otherwise an endpoint by the built-in picker.
fn open_pick(worker: &Worker, pool: &config::Pool, request: &Request, upload: &mut Upload) -> Result<Picked, Error> {
    let endpoints = worker.shared.endpoints[request.pool].snapshot();
    let takes_requests = |upstream: &SocketAddr| endpoints.get(*upstream).is_none_or(|endpoint| !endpoint.draining);
    match pool.default_upstream.filter(takes_requests) {
        Some(upstream) => Ok(without_epp(vec![upstream])),
        None => builtin(worker, request, upload),
    }
}
