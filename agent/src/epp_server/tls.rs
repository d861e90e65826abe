//! The certificate of a picker that was given none: made at the start, for no name. Whoever asks it does not verify.

use std::time::Duration;

use anyhow::Context as _;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

/// How long a client's handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// `client_ca`: PEM of the CAs one of which must have signed the client's certificate.
pub(super) fn self_signed(client_ca: Option<&[u8]>) -> anyhow::Result<ServerTlsConfig> {
    let made = rcgen::generate_simple_self_signed(Vec::new()).context("making a self-signed certificate")?;
    let identity = Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem());
    let config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
    Ok(match client_ca {
        Some(pem) => config.client_ca_root(Certificate::from_pem(pem)),
        None => config,
    })
}
