//! Picks by the EPP, and checks what it picked.

use std::{net::SocketAddr, sync::Arc};

use tokio::time::Instant;

use super::ask::{Asked, Question};
use crate::{
    client::Client,
    config,
    error::Error,
    http::body::BodyError,
    metrics::EppOutcome,
    picker::{
        client::EppClient,
        exchange::{Body, Decision, ExchangeLimits, Outcome},
    },
    proxy::{
        lease::{self, Lease},
        picked::{PickOutcome, Picked},
        request::Request,
    },
    upload::Upload,
    worker::Worker,
};

/// One request's attempt to get a pick from its pool's EPP.
pub(super) struct Attempt<'a> {
    pub(super) worker: &'a Worker,
    pub(super) question: Question<'a>,
    pub(super) started: Instant,
}

impl<'a> Attempt<'a> {
    /// `subset` is the subset hint.
    pub(super) fn new(
        worker: &'a Worker,
        pool: usize,
        epp: &'a EppClient,
        settings: &'a config::Epp,
        subset: Option<Arc<[SocketAddr]>>,
    ) -> Self {
        let limits = ExchangeLimits {
            replaced_body: worker.shared.config.limits.body_bytes.try_into().unwrap_or(usize::MAX),
            memory: Arc::clone(&worker.shared.bodies.memory),
            epp: settings.limits,
        };
        let started = Instant::now();
        let members = worker.shared.endpoints[pool].snapshot();
        let metrics = worker.shared.metrics.pool(pool);
        let wait = settings.unreachable_wait(worker.shared.config.pools[pool].failure_mode);
        Self { worker, started, question: Question { epp, settings, wait, subset, limits, members, metrics } }
    }

    /// Asks the EPP. The inner error is a failure of the EPP, to which the pool's failure mode applies.
    pub(super) async fn pick(
        &self,
        client: &mut Client,
        request: &mut Request,
        upload: &mut Upload,
        held: &mut Option<Lease>,
    ) -> Result<Result<PickOutcome, Error>, Error> {
        request.record.collect(&self.question.epp.replicas().metadata);
        let open = self.worker.shared.metrics.epp_stream();
        let metrics = self.question.metrics;
        match self.question.ask(client, request, upload).await {
            Asked::Answered(Outcome::Immediate(reply), _) => {
                metrics.epp_exchange(EppOutcome::Immediate, self.started.elapsed());
                Ok(Ok(PickOutcome::Reply(reply)))
            }
            Asked::Answered(Outcome::Picked(decision), stream) => {
                let (endpoints, decision) = match admitted(self.worker, request.pool, decision) {
                    Ok(admitted) => admitted,
                    Err(stranger) => return Ok(Err(Error::Stranger(stranger))),
                };
                let mut picked = self.accept(client, request, upload, endpoints, decision, held).await?;
                (picked.stream, picked._open) = (Some(*stream), Some(open));
                Ok(Ok(PickOutcome::Forward(Box::new(picked))))
            }
            Asked::Failed(error) => Ok(Err(Error::Picker(error))),
            Asked::Client(error) => Err(error),
        }
    }

    /// Completes the body and turns the EPP's decision into a pick.
    async fn accept(
        &self,
        client: &mut Client,
        request: &mut Request,
        upload: &mut Upload,
        endpoints: Vec<SocketAddr>,
        mut decision: Decision,
        held: &mut Option<Lease>,
    ) -> Result<Picked, Error> {
        let Self { worker, question, started } = self;
        question.metrics.epp_exchange(EppOutcome::Picked, started.elapsed());
        if question.subset.as_deref().is_some_and(|subset| !subset.contains(&decision.endpoints[0])) {
            question.metrics.epp_outside_subset();
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
        Ok(Picked { endpoints, mutation, body, reusable, by_epp: true, stream: None, _open: None })
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
