//! Tests of TLS to servers with generated certificates.

use std::path::Path;

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::Epp;

const NAME: &str = "epp.example";

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// The certificate and the key, PEM.
fn signed(ca: &Ca) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([NAME.to_owned()]).unwrap().signed_by(&key, ca).unwrap();
    (certificate.pem(), key.serialize_pem())
}

/// A TLS server with a certificate of `ca` that sends two bytes. With `clients`, it requires a client certificate of that CA.
async fn serve(ca: &Ca, clients: Option<&Ca>) -> std::net::SocketAddr {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let roots = Arc::new(pem::roots(ca.pem().as_bytes()).unwrap());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let (certificate, key) = signed(ca);
    let key: PrivateKeyDer<'static> = pem::key(key.as_bytes()).unwrap();
    let config = builder.with_single_cert(pem::certificates(certificate.as_bytes()).unwrap(), key).unwrap();
    let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(tcp).await {
                let _ = stream.write_all(b"ok").await;
                let _ = stream.shutdown().await;
            }
        }
    });
    address
}

/// Whether the handshake succeeds and the greeting arrives.
async fn greets(tls: &Connectors, address: std::net::SocketAddr, name: &'static str) -> bool {
    let tcp = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 2];
    match tls.current().tls.connect(ServerName::try_from(name).unwrap(), tcp).await {
        Ok(mut stream) => stream.read_exact(&mut greeting).await.is_ok_and(|_| greeting == *b"ok"),
        Err(_) => false,
    }
}

fn write(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let file = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    file
}

fn by_ca(file: &Path) -> Epp {
    Epp { tls: ServerTls::Ca(file.to_owned()), ..Epp::new("epp:9002") }
}

fn made(epp: &Epp) -> anyhow::Result<Option<Connectors>> {
    Connectors::new(&epp.tls, epp.client_certificate.as_ref(), H2)
}

fn tls(epp: &Epp) -> Connectors {
    made(epp).unwrap().unwrap()
}

#[tokio::test]
async fn ca_verifies_issuer_and_name() {
    let (folder, ours, other) = (TempDir::new().unwrap(), ca(), ca());
    let address = serve(&ours, None).await;
    let file = write(&folder, "ours.pem", &ours.pem());
    assert!(greets(&tls(&by_ca(&file)), address, NAME).await);
    assert!(!greets(&tls(&by_ca(&file)), address, "other.example").await);
    assert!(!greets(&tls(&by_ca(&write(&folder, "other.pem", &other.pem()))), address, NAME).await);
    let both = write(&folder, "both.pem", &format!("{}{}", other.pem(), ours.pem()));
    assert!(greets(&tls(&by_ca(&both)), address, NAME).await);
    let insecure = Epp { tls: ServerTls::Insecure, ..Epp::new("epp:9002") };
    assert!(greets(&tls(&insecure), address, "other.example").await);
}

#[test]
fn invalid_files_are_rejected_at_start() {
    let folder = TempDir::new().unwrap();
    assert!(made(&Epp::new("epp:9002")).unwrap().is_none());
    for file in [write(&folder, "empty.pem", ""), folder.path().join("none.pem")] {
        assert!(made(&by_ca(&file)).is_err());
    }
    let ((certificate, _), (_, key)) = (signed(&ca()), signed(&ca()));
    let (certificate, key) = (write(&folder, "a.pem", &certificate), write(&folder, "a.key", &key));
    let epp =
        Epp { client_certificate: Some(ClientCertificate { certificate, key }), ..by_ca(&folder.path().join("")) };
    let error = made(&Epp { tls: ServerTls::Insecure, ..epp }).err().unwrap();
    assert_eq!(error.to_string(), "the key does not match the certificate");
}

/// Runs `script` while the files are followed.
async fn following(tls: &Connectors, script: impl Future<Output = ()>) {
    tokio::select! {
        () = tls.follow_files() => unreachable!("follow_files never returns"),
        () = script => {}
    }
}

#[tokio::test(start_paused = true)]
async fn changed_ca_file_is_reloaded_and_broken_one_ignored() {
    let (folder, old, new) = (TempDir::new().unwrap(), ca(), ca());
    let (of_old, of_new) = (serve(&old, None).await, serve(&new, None).await);
    let file = write(&folder, "ca.pem", &old.pem());
    let tls = tls(&by_ca(&file));
    let which = async || (greets(&tls, of_old, NAME).await, greets(&tls, of_new, NAME).await);
    following(&tls, async {
        assert_eq!(which().await, (true, false));
        for broken in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            write(&folder, "ca.pem", broken);
            sleep(2 * READ_INTERVAL).await;
            assert_eq!(which().await, (true, false), "{broken:?}");
        }
        std::fs::remove_file(&file).unwrap();
        sleep(2 * READ_INTERVAL).await;
        assert_eq!(which().await, (true, false));
        write(&folder, "ca.pem", &new.pem());
        sleep(2 * READ_INTERVAL).await;
        assert_eq!(which().await, (false, true));
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn client_certificate_is_used_once_its_key_matches() {
    let (folder, servers, old, new) = (TempDir::new().unwrap(), ca(), ca(), ca());
    let (of_old, of_new) = (serve(&servers, Some(&old)).await, serve(&servers, Some(&new)).await);
    let ((old_certificate, old_key), (new_certificate, new_key)) = (signed(&old), signed(&new));
    let certificate = write(&folder, "client.pem", &old_certificate);
    let key = write(&folder, "client.key", &old_key);
    let client_certificate = Some(ClientCertificate { certificate, key });
    let tls = tls(&Epp { tls: ServerTls::Insecure, client_certificate, ..Epp::new("epp:9002") });
    let which = async || (greets(&tls, of_old, NAME).await, greets(&tls, of_new, NAME).await);
    following(&tls, async {
        assert_eq!(which().await, (true, false));
        write(&folder, "client.pem", &new_certificate);
        sleep(2 * READ_INTERVAL).await;
        assert_eq!(which().await, (true, false), "half of the pair");
        write(&folder, "client.key", &new_key);
        sleep(2 * READ_INTERVAL).await;
        assert_eq!(which().await, (false, true));
    })
    .await;
}
