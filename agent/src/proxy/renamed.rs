//! Finds out whether the EPP sent a request under another model name.

use bytes::Bytes;

use crate::{
    error::Error,
    http::body::ReplayBody,
    picker::exchange::Body,
    rename::{ModelNames, ModelOf},
};

/// The model's names before and after the EPP; `None` if it left the name as it was, or one of the bodies has none.
pub(super) async fn names(body: &Body, client_body: &ReplayBody) -> Result<Option<ModelNames>, Error> {
    let pieces = match body {
        Body::Replaced(pieces) => pieces,
        Body::Renamed(renamed) => {
            let names = ModelNames { client: renamed.client.clone(), picker: renamed.picker.clone() };
            return Ok(Some(names).filter(|names| !names.client.is_empty() && !names.picker.is_empty()));
        }
        Body::Original | Body::DigestOnly(_) => return Ok(None),
    };
    let (mut picker, mut client) = (ModelOf::default(), ModelOf::default());
    let _ = pieces.iter().all(|piece| picker.feed(piece));
    let mut offset = 0;
    while let Some(piece) = client_body.piece_at(offset).await? {
        offset += Bytes::len(&piece) as u64;
        if !client.feed(&piece) {
            break;
        }
    }
    let (Some(picker), Some(client)) = (picker.name(), client.name()) else { return Ok(None) };
    Ok((picker != client).then(|| ModelNames { client: client.to_owned(), picker: picker.to_owned() }))
}
