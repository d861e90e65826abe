//! Certificates that clients present to `[listen.tls]`.

use std::path::Path;

use anyhow::Result;
use http::HeaderName;
use penstock_agent::config::{ClientCertificates, Config};
use penstock_tests::{
    Client, Http2Client, Response, eventually,
    stage::{echo, json},
    tls::Certificate,
};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

const FIELD: &str = "x-forwarded-client-cert";

async fn scene(ca: &Path, accepted: ClientCertificates, adjust: impl FnOnce(&mut Config)) -> Scene {
    Scene::with(Front::Tls1, Back::Http1, first, |config| {
        let tls = config.listen.tls.as_mut().unwrap();
        (tls.client_ca_file, tls.client_certificates) = (Some(ca.to_owned()), accepted);
        config.headers.client_certificate = Some(HeaderName::from_static(FIELD));
        adjust(config);
    })
    .await
}

/// A request of a client that shows this certificate, with fields in which it claims to be someone else.
async fn ask(scene: &Scene, shown: Option<&Certificate>, protocol: &str) -> Result<Response> {
    let forged = "Hash=00;Subject=\"CN=admin\"";
    let request = echo(json("m", 100)).header(FIELD, forged).header("X_Forwarded-Client-Cert", forged);
    let tls = match shown {
        Some(shown) => scene.certificate.connect_showing(scene.addr(), shown, &[protocol]).await?,
        None => scene.certificate.connect(scene.addr(), &[protocol]).await?,
    };
    if protocol == "h2" {
        let mut settings = h2::client::Builder::new();
        return Http2Client::over(tls, "https", "agent.example", &mut settings).await?.request(&request).await;
    }
    Client::over(tls, scene.addr()).request(&request).await
}

/// The fields by which the endpoint learns who the client is.
fn told(response: &Response) -> Vec<String> {
    let echoed = response.echoed();
    let is_it = |name: &str| name.replace('_', "-").eq_ignore_ascii_case(FIELD);
    echoed.headers.iter().filter(|(name, _)| is_it(name)).map(|(_, value)| value.clone()).collect()
}

fn refused(scene: &Scene) -> u64 {
    scene.agent.count("penstock_tls_handshakes_failed_total", &["reason=\"refused\""])
}

#[tokio::test]
async fn certificates_are_verified_and_forwarded() {
    let folder = tempfile::tempdir().unwrap();
    let [known, other] = [(); 2].map(|()| Certificate::new("client.example").unwrap());
    let ca = known.write(folder.path()).unwrap().0;
    for accepted in [ClientCertificates::Required, ClientCertificates::Optional] {
        let scene = scene(&ca, accepted, |_| {}).await;
        for protocol in ["http/1.1", "h2"] {
            let response = ask(&scene, Some(&known), protocol).await.unwrap();
            let [field] = &told(&response)[..] else { panic!("{accepted:?} {protocol}: {:?}", told(&response)) };
            let names = ";Subject=\"CN=rcgen self signed cert\";DNS=client.example;DNS=other.example";
            assert!(field.starts_with("Hash=") && field.ends_with(names), "{field}");
            assert_eq!(field.len(), "Hash=".len() + 64 + names.len());
            let before = refused(&scene);
            assert!(ask(&scene, Some(&other), protocol).await.is_err());
            let without = ask(&scene, None, protocol).await;
            let expected = match accepted {
                ClientCertificates::Required => {
                    assert!(without.is_err());
                    2
                }
                ClientCertificates::Optional => {
                    assert_eq!(told(&without.unwrap()), Vec::<String>::new());
                    1
                }
            };
            eventually(SOON, || refused(&scene) == before + expected).await;
        }
    }
}

/// A client that has shown a certificate once is verified again.
#[tokio::test]
async fn changed_cas_apply_to_the_next_handshake() {
    let folder = tempfile::tempdir().unwrap();
    let [old, new] = [(); 2].map(|()| Certificate::new("client.example").unwrap());
    let ca = old.write(folder.path()).unwrap().0;
    let scene = scene(&ca, ClientCertificates::Required, |_| {}).await;
    assert_eq!(ask(&scene, Some(&old), "http/1.1").await.unwrap().status(), 200);
    // Ignored.
    std::fs::write(&ca, "no certificate").unwrap();
    assert_eq!(ask(&scene, Some(&old), "http/1.1").await.unwrap().status(), 200);
    new.write(folder.path()).unwrap();
    let begin = std::time::Instant::now();
    while ask(&scene, Some(&new), "http/1.1").await.is_err() {
        assert!(begin.elapsed() < SOON, "the new CA is not used");
    }
    assert!(ask(&scene, Some(&old), "http/1.1").await.is_err());
}

/// Whether clients are asked for certificates or not, nobody may forge the field.
#[tokio::test]
async fn field_of_a_client_is_removed_on_every_listener() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Certificate::new("client.example").unwrap().write(folder.path()).unwrap().0;
    let scene = scene(&ca, ClientCertificates::Optional, |_| {}).await;
    let request = echo(json("m", 100)).header(FIELD, "Hash=00").header("x_forwarded_client_cert", "Hash=00");
    let mut plain = Client::connect(scene.agent.addr).await.unwrap();
    assert_eq!(told(&plain.request(&request).await.unwrap()), Vec::<String>::new());
    let mut http2 = Http2Client::connect(scene.agent.addr).await.unwrap();
    assert_eq!(told(&http2.request(&request).await.unwrap()), Vec::<String>::new());
}
