//! Dispatches a pick. If none of its endpoints took the request, the EPP is asked once more, for others: it may know an endpoint
//! for some time after it has gone. A request that may have been processed is not asked about again.

use super::{
    dispatch::{self, EndpointResponse, Failed},
    lease::Lease,
    pick,
    picked::{PickOutcome, Picked},
    request::{Deadline, Request},
};
use crate::{client::Client, error::Error, picker::exchange::ImmediateReply, upload::Upload, worker::Worker};

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
    mut picked: Box<Picked>,
    lease: &mut Option<Lease>,
    deadline: Deadline,
) -> Result<Dispatched, Error> {
    let fields = picked.by_epp.then(|| request.parts.headers.clone());
    let first = attempt(worker, client, request, upload, &mut picked, deadline).await;
    let (error, fields, dead) = match first {
        Ok(response) => return Ok(Dispatched::Response(Box::new(response), picked)),
        Err(Failed { error, dead }) => match (fields, dead) {
            (Some(fields), Some(dead)) => (error, fields, dead),
            _ => return Err(error),
        },
    };
    // Ended before the second exchange begins, so that the EPP never counts the request twice.
    upload.during(client, picked.end()).await?;
    request.parts.headers = fields;
    request.restore_target();
    let again = pick::pick_again(worker, client, request, upload, lease, &dead);
    let mut picked = match deadline.limit(again).await? {
        Some(PickOutcome::Forward(picked)) => picked,
        Some(PickOutcome::Reply(reply)) => return Ok(Dispatched::Reply(reply)),
        None => return Err(error),
    };
    tracing::info!(?dead, endpoints = ?picked.endpoints, "no picked endpoint took the request, trying those of a second pick");
    let second = attempt(worker, client, request, upload, &mut picked, deadline).await;
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
    upload: &mut Upload,
    picked: &mut Picked,
    deadline: Deadline,
) -> Result<EndpointResponse, Failed> {
    dispatch::prepare(worker, client, request, upload, picked).await?;
    deadline.limit(dispatch::dispatch(worker, client, request, upload, picked)).await
}
