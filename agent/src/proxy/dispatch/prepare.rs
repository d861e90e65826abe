//! Prepares a picked request for its endpoint: the model header, the EPP's mutation, the agent's own fields and the trailers.

use http::{Version, header};

use crate::{
    bbr::Naming,
    client::{Client, ClientSocket},
    config::{PickPer, Picker, ResponseToPicker},
    error::Error,
    http::{digest, headers, media},
    kernel::wire::TcpConnection,
    picker::{exchange::Body, mutation},
    proxy::{picked::Picked, receive::set_model, renamed, request::Request},
    steer::{
        reason::SteerReason,
        wire::{RequestFacts, may_watch},
    },
    upload::CompleteBody,
    worker::Worker,
};

pub(in crate::proxy) async fn prepare(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    naming: &Naming,
    picked: &Picked,
    body: &mut CompleteBody,
) -> Result<(), Error> {
    // The model may have been found only after the pick. The endpoint gets the header in any case.
    set_model(worker, &mut request.parts, naming);
    request.streams = naming.streams();
    let changed = match &picked.body {
        Body::Replaced(pieces) => Some(pieces.as_slice()),
        // Only bodies without a content coding are renamed.
        Body::Renamed(_) => Some(&[][..]),
        Body::Original | Body::DigestOnly(_) => None,
    };
    let changed = changed.map(|pieces| (pieces, request.parts.headers.clone()));
    let target = request.parts.uri.clone();
    mutation::apply_to_request(&picked.mutation, &mut request.parts);
    request.client_target = Some(target);
    if let Some((pieces, client_headers)) = changed {
        digest::remove_stale(&mut request.parts.headers, &client_headers, pieces);
    }
    request.names = renamed::names(&picked.body, body.kept()).await?;
    if request.names.is_some() {
        // The response has to be readable.
        request.parts.headers.remove(header::ACCEPT_ENCODING);
    }
    let _ = request.parts.headers.try_append(headers::X_PENSTOCK_HOP, worker.shared.mark.clone());
    worker.shared.fields.filter_picked_head(&mut request.parts.headers);
    request.target = local_target(worker, client);
    request.wire = worker.wire.is_some().then(|| client_leg(worker, client, request));
    worker.shared.fields.filter_client_trailers(body.trailers_mut());
    Ok(())
}

/// The client's connection for path `wire`, or why the response cannot take that path.
fn client_leg(worker: &Worker, client: &Client, request: &Request) -> Result<TcpConnection, SteerReason> {
    let socket = if let Client::Http1(socket) = client { Some(socket) } else { None };
    let pool = &worker.shared.config.pools[request.pool];
    let told = matches!(&pool.picker, Picker::Epp(epp) if epp.response_to_picker == ResponseToPicker::Body);
    may_watch(&RequestFacts {
        http2: socket.is_none(),
        tls: socket.is_some_and(ClientSocket::is_tls),
        endpoint_tls: pool.tls.is_some(),
        http10: request.parts.version == Version::HTTP_10,
        half_close: socket.is_some_and(ClientSocket::answers_half_closed),
        per_request: pool.pick_per == PickPer::Request,
        pipelined: socket.is_some_and(|socket| !socket.buf.is_empty()),
        upgrade: request.upgrade.is_some(),
        streams: request.streams || media::accepts_events(&request.parts.headers),
        told,
        renamed: request.names.is_some(),
        keepalive: pool.sse_keepalive.is_some(),
    })?;
    let socket = socket.ok_or(SteerReason::Http2)?;
    TcpConnection::of(socket.stream()).map_err(|error| {
        tracing::debug!(%error, "client connection cannot be read, relaying the response");
        SteerReason::Unfit
    })
}

/// The client socket's key for path `local`, which has to be known before the endpoint responds.
fn local_target(worker: &Worker, client: &mut Client) -> Option<u64> {
    let steering = worker.endpoints.steering().filter(|steering| steering.has_local())?;
    let Client::Http1(socket) = client else { return None };
    if socket.is_tls() {
        return None;
    }
    socket.make_target(steering, worker.shared.config.steering.client_send_buffer).ok()
}
