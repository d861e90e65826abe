//! Dispatches a pick. If none of its endpoints took the request, the EPP is asked once more, for others: it may know an endpoint
//! for some time after it has gone. A request that may have been processed is not asked about again.

use super::{
    dispatch::{self, EndpointResponse, Failed, Untaken},
    lease::Lease,
    pick,
    picked::{PickOutcome, Picked},
    request::{Deadline, Request},
};
use crate::{
    bbr::Naming,
    client::Client,
    error::Error,
    picker::exchange::ImmediateReply,
    upload::{CompleteBody, Upload},
    worker::Worker,
};

pub(super) enum Dispatched {
    /// An endpoint of this pick responded.
    Response(Box<EndpointResponse>, Box<Picked>),
    /// The EPP's immediate reply, when it was asked once more.
    Reply(ImmediateReply),
}

/// Dispatches the request to the endpoints of the pick, or of a second one. Each mutation applies to the client's own fields.
pub(super) async fn dispatch(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    (mut picked, body): (Box<Picked>, CompleteBody),
    lease: &mut Option<Lease>,
    deadline: Deadline,
) -> Result<Dispatched, Error> {
    let fields = picked.by_epp.then(|| request.parts.headers.clone());
    let first = attempt(worker, client, request, upload.naming(), &mut picked, body, deadline).await;
    let (error, fields, Untaken { dead, body }) = match first {
        Ok(response) => return Ok(Dispatched::Response(Box::new(response), picked)),
        Err(Failed { error, untaken }) => match (fields, untaken) {
            (Some(fields), Some(untaken)) => (error, fields, untaken),
            _ => return Err(error),
        },
    };
    upload.give_back(body);
    // Ended before the second exchange begins, so that the EPP never counts the request twice.
    upload.during(client, picked.end()).await?;
    request.parts.headers = fields;
    request.restore_target();
    let again = pick::pick_again(worker, client, request, upload, lease, &dead);
    let (mut picked, body) = match deadline.limit(again).await? {
        Some(PickOutcome::Forward(picked, body)) => (picked, body),
        Some(PickOutcome::Reply(reply)) => return Ok(Dispatched::Reply(reply)),
        None => return Err(error),
    };
    tracing::info!(?dead, endpoints = ?picked.endpoints, "no picked endpoint took the request, dispatching a second pick");
    let second = attempt(worker, client, request, upload.naming(), &mut picked, body, deadline).await;
    worker.shared.metrics.pool(request.pool).epp_repicked(if second.is_ok() { "served" } else { "failed" });
    match second {
        Ok(response) => Ok(Dispatched::Response(Box::new(response), picked)),
        Err(Failed { error, .. }) => Err(error),
    }
}

async fn attempt(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    naming: &Naming,
    picked: &mut Picked,
    mut body: CompleteBody,
    deadline: Deadline,
) -> Result<EndpointResponse, Failed> {
    dispatch::prepare(worker, client, request, naming, picked, &mut body).await?;
    deadline.limit(dispatch::dispatch(worker, client, request, picked, body)).await
}
