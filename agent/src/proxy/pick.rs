//! The pick: the EPP's while the body uploads, the built-in picker's where that is configured, and the failure mode's
//! when the EPP fails, at whatever moment. The whole body is here before a request goes on, so failing open loses nothing.

use std::net::SocketAddr;

use penstock_proto::ext_proc::HeaderMutation;
use tokio::time::Instant;

use super::{
    Request,
    ask::{Asked, Question},
};
use crate::{
    client::Client,
    config::{self, FailureMode},
    error::Error,
    metrics::{EppOutcome, InFlight},
    picker::{
        client::PickStream,
        exchange::{Body, Decision, ImmediateReply, Limits, Outcome},
    },
    upload::Upload,
    worker::Worker,
};

pub(super) struct Picked {
    /// In the order to try them; never empty.
    pub(super) endpoints: Vec<SocketAddr>,
    pub(super) mutation: HeaderMutation,
    pub(super) body: Body,
    /// The EPP's stream: it lives as long as the response.
    pub(super) stream: Option<PickStream>,
    /// The stream, in the metrics.
    pub(super) _open: Option<InFlight>,
}

pub(super) enum Verdict {
    Forward(Box<Picked>),
    /// The EPP answers the client itself.
    Reply(ImmediateReply),
}

pub(super) async fn pick(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
) -> Result<Verdict, Error> {
    let pool = &worker.shared.config.pools[request.pool];
    let (Some(epp), config::Picker::Epp(settings)) = (&worker.epps[request.pool], &pool.picker) else {
        upload.rest(client).await?;
        return builtin(worker, request.pool, upload).map(|picked| Verdict::Forward(Box::new(picked)));
    };
    let started = Instant::now();
    let metrics = worker.shared.metrics.pool(request.pool);
    let open = worker.shared.metrics.epp_stream();
    let limit = worker.shared.config.limits.body_bytes;
    let limits = Limits { replaced_body: limit.try_into().unwrap_or(usize::MAX) };
    let question = Question { epp, settings, subset: None, limits, metrics };
    let failure = match question.ask(client, request, upload).await {
        Asked::Answered(Outcome::Immediate(reply), _) => {
            metrics.epp_exchange(EppOutcome::Immediate, started.elapsed());
            return Ok(Verdict::Reply(reply));
        }
        Asked::Answered(Outcome::Picked(decision), stream) => match admitted(worker, request.pool, decision) {
            Ok((endpoints, decision)) => {
                metrics.epp_exchange(EppOutcome::Picked, started.elapsed());
                request.record.picked_in(started.elapsed());
                upload.rest(client).await?;
                let Decision { mutation, body, .. } = decision;
                let picked = Picked { endpoints, mutation, body, stream: Some(*stream), _open: Some(open) };
                return Ok(Verdict::Forward(Box::new(picked)));
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
    tracing::warn!(pool = pool.name, mode = ?pool.failure_mode, error = %failure, "the endpoint picker failed");
    match pool.failure_mode {
        FailureMode::Closed => {
            metrics.epp_exchange(EppOutcome::FailClosed, started.elapsed());
            Err(failure)
        }
        FailureMode::Open => {
            metrics.epp_exchange(EppOutcome::FailOpen, started.elapsed());
            upload.rest(client).await?;
            open_pick(worker, pool, request.pool, upload).map(|picked| Verdict::Forward(Box::new(picked)))
        }
    }
}

/// Those of the EPP's endpoints that may be dialled, those that are avoided last: the pool's own that are not draining, and
/// strangers with `passthrough`.
fn admitted(worker: &Worker, pool: usize, decision: Decision) -> Result<(Vec<SocketAddr>, Decision), SocketAddr> {
    let (all, passthrough) = (worker.shared.endpoints[pool].snapshot(), worker.shared.config.pools[pool].passthrough);
    let admits = |address: &SocketAddr| all.get(*address).map_or(passthrough, |endpoint| !endpoint.draining);
    let mut endpoints: Vec<_> = decision.endpoints.iter().copied().filter(admits).collect();
    worker.shared.endpoints[pool].avoided_last(&mut endpoints, Instant::now().into_std());
    match decision.endpoints.first() {
        Some(&stranger) if endpoints.is_empty() => Err(stranger),
        _ => Ok((endpoints, decision)),
    }
}

fn builtin(worker: &Worker, pool: usize, upload: &mut Upload) -> Result<Picked, Error> {
    let pick = worker.shared.pickers[pool].pick(&upload.prompt(), None, Instant::now().into_std())?;
    Ok(unasked(pick.endpoints))
}

fn open_pick(worker: &Worker, pool: &config::Pool, index: usize, upload: &mut Upload) -> Result<Picked, Error> {
    match pool.default_upstream {
        Some(upstream) => Ok(unasked(vec![upstream])),
        None => builtin(worker, index, upload),
    }
}

fn unasked(endpoints: Vec<SocketAddr>) -> Picked {
    Picked { endpoints, mutation: HeaderMutation::default(), body: Body::Original, stream: None, _open: None }
}
