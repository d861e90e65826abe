//! The certificate of a picker that was given none: made at the start, for no name. Whoever asks it does not verify.

use anyhow::Context as _;
use tonic::transport::{Identity, ServerTlsConfig};

pub(super) fn self_signed() -> anyhow::Result<ServerTlsConfig> {
    let made = rcgen::generate_simple_self_signed(Vec::new()).context("making a self-signed certificate")?;
    let identity = Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem());
    Ok(ServerTlsConfig::new().identity(identity))
}
