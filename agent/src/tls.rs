//! TLS toward clients. Reads the certificate from its files and reloads it while the agent runs.

use std::{fs, path::Path, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::CertificateDer,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{Accept, TlsAcceptor};

use crate::{
    config::ListenTls,
    pem::{self, PemError},
};

/// Time between two checks of the files.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// ALPN protocol names (RFC 7301).
pub const H2: &[u8] = b"h2";
const HTTP11: &[u8] = b"http/1.1";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{file}: {error}")]
    File { file: String, error: PemError },
    #[error("{0}")]
    Settings(#[from] rustls::Error),
}

/// The certificate shown to clients. Established connections are not affected by a reload.
#[derive(Debug)]
pub struct Certificate {
    settings: ListenTls,
    /// The contents of the files when last read.
    read: RwLock<(Vec<u8>, Vec<u8>)>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    pub fn read(settings: &ListenTls) -> Result<Arc<Self>, TlsError> {
        let files = contents(settings)?;
        let key = parse(settings, &files)?;
        Ok(Arc::new(Self { settings: settings.clone(), read: RwLock::new(files), current: RwLock::new(Arc::new(key)) }))
    }

    /// The certificate and its intermediate certificates.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current.read().cert.clone()
    }

    /// Reads the files again; returns true if they changed. On an error the current certificate stays. Blocks.
    pub fn reload_if_changed(&self) -> Result<bool, TlsError> {
        let files = contents(&self.settings)?;
        if *self.read.read() == files {
            return Ok(false);
        }
        let key = parse(&self.settings, &files);
        // An error in these files is reported once.
        *self.read.write() = files;
        *self.current.write() = Arc::new(key?);
        Ok(true)
    }

    /// Reloads the files whenever they change, on the runtime's blocking threads. Never returns. Each error is logged
    /// once.
    pub async fn follow(self: Arc<Self>) {
        let mut reported = None;
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let certificate = Arc::clone(&self);
            let Ok(read) = tokio::task::spawn_blocking(move || certificate.reload_if_changed()).await else { continue };
            match read {
                Ok(true) => tracing::info!(file = %self.settings.cert_file.display(), "certificate reloaded"),
                Ok(false) => reported = None,
                Err(error) => {
                    let error = error.to_string();
                    if reported.as_ref() != Some(&error) {
                        tracing::warn!(error, "certificate reload failed, keeping the current one");
                        reported = Some(error);
                    }
                }
            }
        }
    }

    /// Creates an acceptor that allows at most `handshakes` concurrent handshakes. `http2`: offer HTTP/2 in ALPN.
    pub fn acceptor(self: &Arc<Self>, http2: bool, handshakes: usize) -> Result<Acceptor, TlsError> {
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions()?;
        let certificate: Arc<dyn ResolvesServerCert> = Arc::<Self>::clone(self);
        let mut config = builder.with_no_client_auth().with_cert_resolver(certificate);
        config.alpn_protocols = if http2 { vec![H2.to_vec(), HTTP11.to_vec()] } else { vec![HTTP11.to_vec()] };
        Ok(Acceptor { tls: TlsAcceptor::from(Arc::new(config)), places: Arc::new(Semaphore::new(handshakes)) })
    }
}

/// Accepts TLS connections, with a limit of concurrent handshakes over all workers.
#[derive(Clone)]
pub struct Acceptor {
    tls: TlsAcceptor,
    places: Arc<Semaphore>,
}

impl Acceptor {
    /// Waits until another handshake may begin. Cancel-safe.
    pub async fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    /// Performs a handshake.
    pub fn accept(&self, stream: TcpStream) -> Accept<TcpStream> {
        self.tls.accept(stream)
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read()))
    }
}

fn contents(settings: &ListenTls) -> Result<(Vec<u8>, Vec<u8>), TlsError> {
    let read = |path: &Path| fs::read(path).map_err(PemError::from).map_err(wrong(path));
    Ok((read(&settings.cert_file)?, read(&settings.key_file)?))
}

fn parse(settings: &ListenTls, (certificate, key): &(Vec<u8>, Vec<u8>)) -> Result<CertifiedKey, TlsError> {
    pem::certificates(certificate).map_err(wrong(&settings.cert_file))?;
    pem::certified_key(certificate, key).map_err(wrong(&settings.key_file))
}

fn wrong(path: &Path) -> impl FnOnce(PemError) -> TlsError {
    let file = path.display().to_string();
    |error| TlsError::File { file, error }
}
