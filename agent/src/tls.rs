//! TLS toward clients. Reads the certificate, and the CAs of clients' certificates, from files and reloads them while the agent runs.

pub mod identity;

use std::{fs, path::Path, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::ring,
    pki_types::{CertificateDer, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{Accept, TlsAcceptor};

use crate::{
    config::{ClientCertificates, ListenTls},
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

/// The certificate shown to clients, and what verifies theirs. Established connections are not affected by a reload.
#[derive(Debug)]
pub struct Certificate {
    settings: ListenTls,
    /// The contents of the files when last read.
    read: RwLock<FileContents>,
    current: RwLock<Arc<CertifiedKey>>,
    /// `None` if clients are not asked for certificates.
    clients: RwLock<Option<Arc<dyn ClientCertVerifier>>>,
}

/// The contents of the files.
#[derive(Debug, PartialEq, Eq)]
struct FileContents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// What follows from the contents.
struct ParsedFiles {
    certificate: CertifiedKey,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl Certificate {
    pub fn read(settings: &ListenTls) -> Result<Arc<Self>, TlsError> {
        let files = contents(settings)?;
        let ParsedFiles { certificate, clients } = parse(settings, &files)?;
        let (current, clients) = (RwLock::new(Arc::new(certificate)), RwLock::new(clients));
        Ok(Arc::new(Self { settings: settings.clone(), read: RwLock::new(files), current, clients }))
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
        let parsed = parse(&self.settings, &files);
        // An error in these files is reported once.
        *self.read.write() = files;
        let ParsedFiles { certificate, clients } = parsed?;
        *self.current.write() = Arc::new(certificate);
        *self.clients.write() = clients;
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
        let asks = self.clients.read().is_some();
        let builder = if asks {
            builder.with_client_cert_verifier(Arc::<Self>::clone(self))
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_cert_resolver(certificate);
        if asks {
            // A resumed session would not be verified against CAs that have changed since.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
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

/// Verifies by the CAs as they are now.
impl ClientCertVerifier for Certificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Without hints, a client presents the certificate that it has.
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifier()?.verify_client_cert(certificate, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier().map(|verifier| verifier.supported_verify_schemes()).unwrap_or_default()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.settings.client_certificates == ClientCertificates::Required
    }
}

impl Certificate {
    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
        self.clients.read().clone().ok_or_else(|| rustls::Error::General("no CA of clients is known".to_owned()))
    }
}

fn contents(settings: &ListenTls) -> Result<FileContents, TlsError> {
    let read = |path: &Path| fs::read(path).map_err(PemError::from).map_err(wrong(path));
    let client_ca = settings.client_ca_file.as_deref().map(read).transpose()?;
    Ok(FileContents { certificate: read(&settings.cert_file)?, key: read(&settings.key_file)?, client_ca })
}

fn parse(settings: &ListenTls, files: &FileContents) -> Result<ParsedFiles, TlsError> {
    let FileContents { certificate, key, client_ca } = files;
    pem::certificates(certificate).map_err(wrong(&settings.cert_file))?;
    let certificate = pem::certified_key(certificate, key).map_err(wrong(&settings.key_file))?;
    let clients = match (client_ca, &settings.client_ca_file) {
        (Some(text), Some(file)) => {
            let roots = Arc::new(pem::roots(text).map_err(wrong(file))?);
            let builder = WebPkiClientVerifier::builder_with_provider(roots, Arc::new(ring::default_provider()));
            let builder = match settings.client_certificates {
                ClientCertificates::Required => builder,
                ClientCertificates::Optional => builder.allow_unauthenticated(),
            };
            let built = builder.build().map_err(|error| rustls::Error::General(error.to_string()))?;
            Some(built)
        }
        _ => None,
    };
    Ok(ParsedFiles { certificate, clients })
}

fn wrong(path: &Path) -> impl FnOnce(PemError) -> TlsError {
    let file = path.display().to_string();
    |error| TlsError::File { file, error }
}
