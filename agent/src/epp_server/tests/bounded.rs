//! Tests the limits on single clients and on all clients together.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::*;

fn limited(limits: EppServerLimits) -> EppServerConfig {
    EppServerConfig { limits, ..config(1) }
}

async fn failed(exchange: &mut Exchange) -> Code {
    timeout(SOON, exchange.replies.message()).await.expect("an end").expect_err("an error").code()
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed() {
    let epp = Epp::start(limited(EppServerLimits { connections: 1, ..EppServerLimits::default() })).await;
    let (picked, exchange) = epp.pick().await;
    assert_eq!(picked, "10.0.0.1:8000");
    let mut beyond = TcpStream::connect(epp.address).await.unwrap();
    let read = timeout(SOON, beyond.read(&mut [0; 1])).await.expect("the connection is closed");
    assert_eq!(read.unwrap_or(0), 0);
    // The existing connection still works.
    drop(exchange);
    epp.pick().await;
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused() {
    let epp = Epp::start(limited(EppServerLimits { streams: 1, ..EppServerLimits::default() })).await;
    let (_, open) = epp.pick().await;
    // The limit covers all connections, so another connection is refused a stream, too.
    let channel = Endpoint::from_shared(format!("http://{}", epp.address)).unwrap().connect_lazy();
    let mut other = ExternalProcessorClient::new(channel);
    let refused = timeout(SOON, other.process(tokio_stream::pending())).await.unwrap().map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(open);
    let begin = Instant::now();
    while timeout(SOON, other.process(tokio_stream::pending())).await.unwrap().is_err() {
        assert!(begin.elapsed() < SOON, "the ended stream is still counted");
    }
}

#[tokio::test]
async fn held_bodies_are_bounded_over_all_streams() {
    let limits = EppServerLimits { held_bytes: BODY.len() + 10, ..EppServerLimits::default() };
    let epp = Epp::start(limited(limits)).await;
    let holding = epp.open().await;
    holding.send(head("POST", false)).await;
    holding.send(Ask::RequestBody(HttpBody { body: vec![b' '; 20].into(), end_of_stream: false })).await;
    // The second of the two bodies does not fit.
    let begin = Instant::now();
    loop {
        let mut exchange = epp.open().await;
        exchange.post(BODY).await;
        let message = exchange.next().await.expect("an answer");
        if let Reply::ImmediateResponse(reply) = message.response.unwrap() {
            assert_eq!(reply.status.unwrap().code, 503);
            break;
        }
        assert!(begin.elapsed() < SOON, "the first body has not arrived");
    }
    drop(holding);
    let begin = Instant::now();
    loop {
        let mut exchange = epp.open().await;
        exchange.post(BODY).await;
        if matches!(exchange.reply().await, Reply::RequestHeaders(_)) {
            break;
        }
        assert!(begin.elapsed() < SOON, "the held bytes were not released");
    }
}

#[tokio::test]
async fn heads_and_messages_are_bounded() {
    let limits = EppServerLimits { fields: 20, field_bytes: 1000, messages: 10, ..EppServerLimits::default() };
    let epp = Epp::start(limited(limits)).await;
    let request = |fields: usize, length: usize| {
        let mut request = http::Request::get("/");
        for n in 0..fields {
            request = request.header(format!("x-{n}"), "v".repeat(length));
        }
        message::request_head(&request.body(()).unwrap().into_parts().0, true)
    };
    let mut allowed = epp.open().await;
    allowed.send(request(10, 10)).await;
    assert!(matches!(allowed.reply().await, Reply::RequestHeaders(_)));
    for (fields, length) in [(21, 1), (1, 1001)] {
        let mut exchange = epp.open().await;
        exchange.send(request(fields, length)).await;
        assert_eq!(failed(&mut exchange).await, Code::ResourceExhausted, "{fields} {length}");
    }
    let mut exchange = epp.open().await;
    exchange.send(head("POST", false)).await;
    for _ in 0..10 {
        exchange.send(Ask::RequestBody(HttpBody::default())).await;
    }
    assert_eq!(failed(&mut exchange).await, Code::ResourceExhausted);
}

#[tokio::test]
async fn silent_stream_times_out() {
    let limits = EppServerLimits { idle: Duration::from_millis(50), ..EppServerLimits::default() };
    let epp = Epp::start(limited(limits)).await;
    let mut exchange = epp.open().await;
    exchange.send(head("POST", false)).await;
    assert_eq!(failed(&mut exchange).await, Code::DeadlineExceeded);
    // After the pick, `response_idle` applies.
    let limits = EppServerLimits { response_idle: Duration::from_millis(50), ..EppServerLimits::default() };
    let epp = Epp::start(limited(limits)).await;
    let (_, mut exchange) = epp.pick().await;
    assert_eq!(failed(&mut exchange).await, Code::DeadlineExceeded);
}

#[tokio::test]
async fn client_without_a_valid_certificate_is_refused() {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = || CertifiedIssuer::self_signed(params.clone(), KeyPair::generate().unwrap()).unwrap();
    let (known, other) = (authority(), authority());
    let client_ca = Some(known.pem().into_bytes());
    let epp = Epp::start(EppServerConfig { tls: EppServerTls::SelfSigned, client_ca, ..config(1) }).await;
    let folder = tempfile::tempdir().unwrap();
    for (issuer, admitted) in [(Some(&known), true), (Some(&other), false), (None, false)] {
        let client_certificate = issuer.map(|issuer| {
            let key = KeyPair::generate().unwrap();
            let signed = CertificateParams::new(vec!["agent".to_owned()]).unwrap().signed_by(&key, issuer).unwrap();
            let (certificate, key_file) = (folder.path().join("client.pem"), folder.path().join("client.key"));
            std::fs::write(&certificate, signed.pem()).unwrap();
            std::fs::write(&key_file, key.serialize_pem()).unwrap();
            config::ClientCertificate { certificate, key: key_file }
        });
        let uri = format!("http://{}", epp.address);
        let dial = DialTls { address: epp.address, client_certificate };
        let channel = Endpoint::from_shared(uri).unwrap().connect_with_connector(dial).await;
        let asked = match channel {
            Ok(channel) => {
                let mut client = HealthClient::new(channel);
                let asked = client.check(HealthCheckRequest { service: String::new() });
                timeout(SOON, asked).await.expect("an answer").is_ok()
            }
            Err(_) => false,
        };
        assert_eq!(asked, admitted);
    }
}

/// Nothing, and a part of the preface: over TCP, and after the TLS handshake.
#[tokio::test]
async fn connection_that_does_not_speak_http2_is_closed_and_its_place_is_free() {
    let limits = EppServerLimits { connections: 1, opening: Duration::from_millis(500), ..EppServerLimits::default() };
    for tls in [EppServerTls::Off, EppServerTls::SelfSigned] {
        let epp = Epp::start(EppServerConfig { tls, ..limited(limits) }).await;
        for sent in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
            let begin = Instant::now();
            let end = match tls {
                EppServerTls::Off => end(TcpStream::connect(epp.address).await.unwrap(), sent).await,
                EppServerTls::SelfSigned => {
                    let mut dial = DialTls { address: epp.address, client_certificate: None };
                    end(dial.call(Uri::from_static("http://epp")).await.unwrap().into_inner(), sent).await
                }
            };
            assert_eq!(end.unwrap_or(0), 0);
            // The handshake may have taken a part of the time.
            assert!(begin.elapsed() >= limits.opening / 2, "closed after {:?}", begin.elapsed());
        }
    }
}

/// Sends and then only reads.
async fn end(mut stream: impl AsyncRead + AsyncWrite + Unpin, sent: &[u8]) -> std::io::Result<usize> {
    stream.write_all(sent).await.unwrap();
    timeout(SOON, stream.read(&mut [0; 1])).await.expect("the connection is closed")
}

/// Clients may send one for each empty piece of a message.
#[tokio::test]
async fn empty_frames_do_not_end_a_connection() {
    let epp = Epp::start(config(1)).await;
    let mut client = TcpStream::connect(epp.address).await.unwrap();
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    // Indexed and literal fields (RFC 7541, appendix A): POST, http, path, authority, content type.
    let literal = |index: &[u8], value: &str| [index, &[value.len() as u8], value.as_bytes()].concat();
    let head = [
        vec![0x83, 0x86],
        literal(&[4], "/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
        literal(&[1], "a"),
        literal(&[15, 16], "application/grpc"),
    ];
    let sent = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &head.concat()),
        frame(0, 0, 1, &[]).repeat(300),
        frame(6, 0, 0, b"answered"),
    ];
    client.write_all(&sent.concat()).await.unwrap();
    let answer = frame(6, 1, 0, b"answered");
    let mut received = Vec::new();
    while !received.windows(answer.len()).any(|bytes| bytes == answer) {
        let read = timeout(SOON, client.read_buf(&mut received)).await.expect("an answer");
        assert!(read.is_ok_and(|bytes| bytes > 0), "closed after {:?}", received.escape_ascii().to_string());
    }
}
