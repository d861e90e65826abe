//! Picks by the EPP, and checks what it picked.

use std::{cell::RefCell, net::SocketAddr, sync::Arc};

use tokio::time::Instant;

use super::{
    ask::{Asked, Question},
    failure_mode::PickFailure,
    short::{ShortRequest, short_request},
};
use crate::{
    client::Client,
    config,
    error::Error,
    http::body::{BodyError, ReplayBody},
    metrics::EppOutcome,
    picker::{
        client::{EppClient, PickStream},
        exchange::{Body, Decision, ExchangeLimits, Outcome},
    },
    proxy::{
        lease::{self, Lease},
        picked::{PickOutcome, Picked},
        request::Request,
    },
    upload::{CompleteBody, Upload},
    worker::Worker,
};

/// One request's attempt to get a pick from its pool's EPP.
pub(super) struct Attempt<'a> {
    pub(super) worker: &'a Worker,
    pub(super) question: Question<'a>,
    pub(super) started: Instant,
}

/// A decision that can be followed.
struct Accepted {
    /// The admitted ones.
    endpoints: Vec<SocketAddr>,
    decision: Decision,
    /// Whether the EPP got the whole body.
    is_whole: bool,
}

impl<'a> Attempt<'a> {
    /// The endpoints in `dead` did not take the request.
    pub(super) fn new(
        worker: &'a Worker,
        pool: usize,
        epp: &'a EppClient,
        settings: &'a config::Epp,
        dead: &'a [SocketAddr],
    ) -> Self {
        let limits = ExchangeLimits {
            replaced_body: worker.shared.config.limits.body_bytes.try_into().unwrap_or(usize::MAX),
            memory: Arc::clone(&worker.shared.bodies.memory),
            epp: settings.limits,
        };
        let started = Instant::now();
        let (members, hint) = (&worker.shared.endpoints[pool], RefCell::default());
        let metrics = worker.shared.metrics.pool(pool);
        let wait = settings.unreachable_wait(worker.shared.config.pools[pool].failure_mode);
        Self { worker, started, question: Question { epp, settings, wait, dead, hint, limits, members, metrics } }
    }

    /// Asks the EPP. The inner error is what the pool's failure mode applies to ([`failure_mode`](super::failure_mode)).
    pub(super) async fn pick(
        &self,
        client: &mut Client,
        request: &mut Request,
        upload: &mut Upload,
        held: &mut Option<Lease>,
    ) -> Result<Result<PickOutcome, PickFailure>, Error> {
        request.record.collect(&self.question.epp.replicas().metadata);
        let open = self.worker.shared.metrics.epp_stream();
        let metrics = self.question.metrics;
        let short = short_request(self.worker, self.question.settings, client, request, upload).await?;
        let (asked, is_whole) = match &short {
            Some(short) => self.ask_shortly(short, client, request, upload).await?,
            None => (self.question.ask(client, request, upload, None).await, true),
        };
        drop(short);
        match asked {
            Asked::Answered(Outcome::Immediate(reply), _) => {
                metrics.epp_exchange(EppOutcome::Immediate, self.started.elapsed());
                Ok(Ok(PickOutcome::Reply(reply)))
            }
            Asked::Answered(Outcome::Picked(decision), mut stream) => {
                let accepted = match admitted(self.worker, request.pool, decision) {
                    Ok((endpoints, decision)) => Accepted { endpoints, decision, is_whole },
                    Err(stranger) => return Ok(Err(PickFailure::Stranger(stranger))),
                };
                let (mut picked, body) = self.accept(client, request, upload, accepted, held, &mut stream).await?;
                (picked.stream, picked._open) = (Some(*stream), Some(open));
                Ok(Ok(PickOutcome::Forward(Box::new(picked), body)))
            }
            Asked::Failed(error) => Ok(Err(PickFailure::Epp(error))),
            Asked::Client(error) => Err(error),
        }
    }

    /// Asks the EPP with an abridged request. If it changes more of the body than the model, asks again with the whole body. Returns
    /// whether the EPP decided about that.
    async fn ask_shortly(
        &self,
        short: &ShortRequest,
        client: &mut Client,
        request: &Request,
        upload: &mut Upload,
    ) -> Result<(Asked, bool), Error> {
        let metrics = self.question.metrics;
        let (mut decision, stream) = match self.question.ask(client, request, upload, Some(short)).await {
            Asked::Answered(Outcome::Picked(decision), stream) => (decision, stream),
            asked => {
                metrics.epp_abridged("undecided");
                return Ok((asked, false));
            }
        };
        if let Some(body) = short.body_for(&decision.body) {
            metrics.epp_abridged(if body == Body::Original { "unchanged" } else { "renamed" });
            decision.body = body;
            return Ok((Asked::Answered(Outcome::Picked(decision), stream), false));
        }
        metrics.epp_abridged("rewritten");
        self.worker.shared.rewriters[request.pool].found(Instant::now().into_std());
        // Ended before the second exchange begins, so that the EPP never counts the request twice.
        upload.during(client, stream.end()).await?;
        Ok((self.question.ask(client, request, upload, None).await, true))
    }

    /// Completes the body and turns the EPP's decision into a pick. Fails with `Evicted` if the EPP evicts the request meanwhile.
    async fn accept(
        &self,
        client: &mut Client,
        request: &mut Request,
        upload: &mut Upload,
        accepted: Accepted,
        held: &mut Option<Lease>,
        stream: &mut PickStream,
    ) -> Result<(Picked, CompleteBody), Error> {
        let Self { worker, question, started } = self;
        let Accepted { endpoints, mut decision, is_whole } = accepted;
        question.metrics.epp_exchange(EppOutcome::Picked, started.elapsed());
        if question.hint.borrow().as_deref().is_some_and(|hint| !hint.contains(&decision.endpoints[0])) {
            question.metrics.epp_outside_subset();
        }
        request.record.picked_in(started.elapsed());
        let complete = tokio::select! {
            biased;
            reply = stream.evicted() => return Err(Error::Evicted(Box::new(reply))),
            complete = upload.complete(client) => complete?,
        };
        question.probe(question.probes(), request, &complete).await?;
        decision.body = final_body(worker, complete.kept(), decision.body).await?;
        let length = is_whole.then(|| complete.kept().len());
        let reusable = lease::is_reusable(worker, request.pool, &decision, &request.parts, length);
        if reusable {
            *held = Lease::new(worker, request.pool, &endpoints);
        }
        let Decision { mutation, body, .. } = decision;
        Ok((Picked { endpoints, mutation, body, reusable, by_epp: true, stream: None, _open: None }, complete))
    }
}

/// The body to send to the endpoint. If the EPP returned the client's body unchanged, as most do, the client's is used and the
/// copy is dropped. A replacement for which there was no memory does not count as a failure of the EPP: failing open with the
/// client's body would send a different request.
async fn final_body(worker: &Worker, client: &ReplayBody, body: Body) -> Result<Body, Error> {
    let same = match &body {
        Body::Original => true,
        Body::Renamed(_) => false,
        Body::Replaced(pieces) => client.is_same(pieces).await?,
        Body::DigestOnly(digest) => client.sha256().await? == *digest,
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
