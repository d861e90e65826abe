//! Prepares a picked request for its endpoint: the model header, the EPP's mutation, the agent's own fields and the trailers.

use http::header;

use crate::{
    client::Client,
    error::Error,
    http::{digest, headers, trailers},
    picker::{exchange::Body, mutation},
    proxy::{picked::Picked, receive::set_model, renamed, request::Request},
    upload::Upload,
    worker::Worker,
};

pub(in crate::proxy) async fn prepare(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &mut Upload,
    picked: &Picked,
) -> Result<(), Error> {
    // The model may have been found only after the pick. The endpoint gets the header in any case.
    set_model(worker, &mut request.parts, upload);
    request.streams = upload.naming().streams();
    let changed = match &picked.body {
        Body::Replaced(pieces) => Some(pieces.as_slice()),
        // Only bodies without a content coding are renamed.
        Body::Renamed(_) => Some(&[][..]),
        Body::Original | Body::DigestOnly(_) => None,
    };
    let changed = changed.map(|pieces| (pieces, request.parts.headers.clone()));
    mutation::apply(&picked.mutation, &mut request.parts.headers);
    if let Some((pieces, client_headers)) = changed {
        digest::remove_stale(&mut request.parts.headers, &client_headers, pieces);
    }
    request.names = renamed::names(&picked.body, upload).await?;
    if request.names.is_some() {
        // The response has to be readable.
        request.parts.headers.remove(header::ACCEPT_ENCODING);
    }
    let _ = request.parts.headers.try_append(headers::X_PENSTOCK_HOP, worker.shared.mark.clone());
    for pick in &worker.shared.pick_headers {
        headers::remove_pick(&mut request.parts.headers, pick);
    }
    request.target = local_target(worker, client);
    prepare_trailers(worker, upload);
    Ok(())
}

/// Filters the client's trailers by the same rules as its head: it may not set fields that belong to the agent or the EPP.
fn prepare_trailers(worker: &Worker, upload: &mut Upload) {
    let config = &worker.shared.config;
    trailers::filter(upload.trailers_mut());
    headers::remove_hints(upload.trailers_mut(), &config.headers);
    for control in worker.shared.pick_headers.iter().chain([&config.bbr.base_model_header]) {
        headers::remove_control(upload.trailers_mut(), control, &config.bbr.header);
    }
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
