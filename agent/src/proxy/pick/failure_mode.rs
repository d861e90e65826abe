//! What a pool does after its EPP failed: respond with 503 (`closed`), or pick without the EPP (`open`).

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

/// Applies the pool's failure mode after `failure` of its EPP.
pub(super) async fn apply(
    attempt: &Attempt<'_>,
    failure: Error,
    client: &mut Client,
    request: &Request,
    upload: &mut Upload,
) -> Result<PickOutcome, Error> {
    let Attempt { worker, question, started } = attempt;
    let (pool, metrics) = (&worker.shared.config.pools[request.pool], question.metrics);
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
    let held = matches!(failure, Error::Picker(PickError::Held)) && !question.settings.open_on_deadline;
    match pool.failure_mode {
        _ if held => {
            metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
            Err(failure)
        }
        FailureMode::Closed => {
            if !probes.is_empty()
                && let Ok(Ok(body)) = timeout(PROBE_BODY, upload.complete(client)).await
            {
                question.probe(probes, request, &body).await?;
            }
            metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
            Err(failure)
        }
        FailureMode::Open => {
            metrics.epp_exchange(EppOutcome::FailOpen, started.elapsed());
            let body = upload.complete(client).await?;
            question.probe(probes, request, &body).await?;
            let picked = open_pick(worker, pool, request, upload)?;
            if pool.pick_per != PickPer::Request {
                metrics.pick_not_held("fail_open");
            }
            Ok(PickOutcome::Forward(Box::new(Picked { reusable: false, ..picked }), body))
        }
    }
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
