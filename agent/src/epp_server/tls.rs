//! A self-signed certificate without names, made at start. Clients of EPPs do not verify it.

use std::time::Duration;

use anyhow::Context as _;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

/// How long a client's handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The server's TLS settings. `client_ca` is the PEM of the CAs that may sign client certificates.
pub(super) fn self_signed(client_ca: Option<&[u8]>) -> anyhow::Result<ServerTlsConfig> {
    let made = rcgen::generate_simple_self_signed(Vec::new()).context("making a self-signed certificate")?;
    let identity = Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem());
    let config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
    Ok(match client_ca {
        Some(pem) => config.client_ca_root(Certificate::from_pem(pem)),
        None => config,
    })
}
