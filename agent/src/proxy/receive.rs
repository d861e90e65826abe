//! Receives a request: prepares its head, finds its route, and reads the body until the pool and the model are known.

use http::{request, uri::Scheme};

use super::request::Request;
use crate::{
    bbr::Naming,
    client::Client,
    error::Error,
    http::{
        headers::{self, Arrival},
        request::RequestBody,
    },
    probe::Point,
    route::NotRouted,
    upload::Upload,
    worker::Worker,
};

/// Bytes of a JSON body that are read to find the model. After that the EPP is asked without it.
const MODEL_WINDOW: u64 = 64 * 1024;

/// Prepares the head and reads the body until the pool and the model are known.
pub(super) async fn receive(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    body: RequestBody,
    expect_continue: bool,
) -> Result<Upload, Error> {
    worker.shared.probe.at(Point::Request(&request.parts));
    let config = &worker.shared.config;
    let request::Parts { uri, headers, .. } = &request.parts;
    let naming = |has_body| Naming::new(&config.bbr, headers, uri.query(), has_body, &worker.shared.metrics);
    let mut upload = Upload::new(body, &request.parts.headers, &config.limits, &worker.shared.bodies, naming)?;
    let arrival = Arrival { client: request.record.client.ip(), version: request.parts.version, tls: client.is_tls() };
    prepare(worker, request, &arrival)?;
    let router = &worker.shared.router;
    let needs_model = router.needs_model(&request.parts);
    let route = |request: &mut Request| {
        let routed = router.route(&request.parts, |below| fastrand::u64(..below));
        let routed = routed.map_err(|not_routed| unrouted(not_routed, &request.parts))?;
        request.pool = routed.pool;
        request.set_timeouts(routed.timeouts);
        if let Some(why) = &config.pools[routed.pool].unusable {
            return Err(Error::Pool(why.clone()));
        }
        // A route's changes are for its own pool, and the list asks all of them.
        if let Some(changes) = routed.changes
            && !request.lists_models
        {
            request.change(changes)?;
        }
        Ok::<_, Error>(routed.timeouts.body)
    };
    if needs_model {
        request.set_timeouts(router.body_timeouts(&request.parts).unwrap_or(request.timeouts));
    } else {
        route(request)?;
    }
    upload.begin(needs_model, request.timeouts.body)?;
    let beginning = async {
        if expect_continue && upload.has_body() {
            client.send_continue().await.map_err(|_| Error::ClientGone)?;
        }
        while !upload.is_done() && !upload.naming().is_settled() && (needs_model || upload.kept.len() < MODEL_WINDOW) {
            let read = upload.read(client).await?;
            upload.take(read).await?;
        }
        Ok::<_, Error>(())
    };
    request.deadline.limit(beginning).await?;
    set_model(worker, &mut request.parts, upload.naming());
    if needs_model {
        upload.set_timeout(route(request)?);
    }
    Ok(upload)
}

/// The answer to a request that goes to no pool.
fn unrouted(why: NotRouted<'_>, request: &request::Parts) -> Error {
    match why {
        NotRouted::NoRoute => Error::NoRoute,
        NotRouted::Refused(why) => Error::Route(why.clone()),
        NotRouted::Redirected(to) => Error::Redirected { status: to.status(), location: to.location(request) },
    }
}

/// Prepares the head.
fn prepare(worker: &Worker, request: &mut Request, arrival: &Arrival) -> Result<(), Error> {
    let config = &worker.shared.config;
    if arrival.tls {
        request.parts.extensions.insert(Scheme::HTTPS);
    }
    let headers = &mut request.parts.headers;
    if headers::is_marked(headers, &worker.shared.mark) {
        return Err(Error::Loop);
    }
    headers::prepare_request(headers, arrival, &worker.shared.fields, &config.headers);
    if let (Some(name), Some(identity)) = (&config.headers.client_certificate, &request.record.identity) {
        headers.insert(name.clone(), identity.field.clone());
    }
    request.record.trace(worker, &mut request.parts, arrival);
    Ok(())
}

pub(super) fn set_model(worker: &Worker, parts: &mut request::Parts, naming: &Naming) {
    if let Some(model) = naming.model(&worker.shared.config.bbr) {
        worker.shared.model_headers.set(&mut parts.headers, model);
    }
}
