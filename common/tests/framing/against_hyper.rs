//! The framing parser compared with hyper. [`Differs`] lists all permitted differences; any other difference fails the test.

use std::{error::Error, io};

use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, runtime::Runtime};

use super::*;

/// How hyper's client reads a response with this body, after which the peer closes.
fn hyper(runtime: &Runtime, framing: Framing, body: &[u8]) -> (Vec<u8>, End) {
    let head = match framing.state {
        state::LENGTH | state::DONE => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", framing.left),
        state::UNTIL_CLOSE => "HTTP/1.1 200 OK\r\n\r\n".into(),
        _ => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
    };
    runtime.block_on(async {
        let (client, mut server) = tokio::io::duplex(head.len() + body.len() + 1024);
        let (mut sender, connection) = http1::handshake(TokioIo::new(client)).await.expect("handshake");
        let connection = tokio::spawn(connection);
        let request = sender.send_request(Request::new(Empty::<Bytes>::new()));
        let respond = async {
            // After the request, because hyper rejects earlier bytes.
            let mut request = [0; 1024];
            let _ = tokio::io::AsyncReadExt::read(&mut server, &mut request).await;
            server.write_all(head.as_bytes()).await.expect("head");
            server.write_all(body).await.expect("body");
            server.shutdown().await.expect("close");
        };
        let (response, ()) = tokio::join!(request, respond);
        let mut incoming = response.expect("a response").into_body();
        let mut payload = Vec::new();
        let end = loop {
            match incoming.frame().await {
                None => break End::Complete,
                Some(Ok(frame)) => payload.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(error)) => {
                    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
                    let short = source.is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof);
                    break if short { End::Incomplete } else { End::Invalid };
                }
            }
        };
        connection.abort();
        (payload, end)
    })
}

/// A difference from hyper, and why it is harmless.
#[derive(Debug, PartialEq)]
enum Differs {
    Not,
    /// hyper accepts a NUL in a chunk extension. The parser refuses it: no server sends one, and text-based intermediaries end
    /// strings there.
    NulInExtension,
    /// hyper accepts a bare LF or a NUL in the trailer section and searches for CR LF. The parser refuses it at once, because
    /// others take the bare LF for the end of the line.
    BareLfOrNulInTrailers,
    /// The end is the same, but hyper requires trailer lines to be header fields. The parser does not check them: the client gets
    /// them unchanged.
    TrailersNotFields,
}

/// Compares the parser and hyper on the same bytes. Panics on a difference that [`Differs`] does not list.
fn compare(runtime: &Runtime, framing: Framing, wire: &[u8]) -> Differs {
    let (taken, payload, end) = read(framing, wire);
    let (hyper_payload, hyper_end) = hyper(runtime, framing, wire);
    let culprit = (end == End::Invalid).then(|| wire[taken - 1]);
    let before = (end == End::Invalid).then(|| {
        let mut before = framing;
        before.feed(&wire[..taken - 1]);
        before.state
    });
    if payload == hyper_payload && end == hyper_end {
        if end == End::Complete && !framing.is_until_close() && taken > 0 {
            // hyper ends at the same byte: with one byte less the body is incomplete.
            assert_eq!(hyper(runtime, framing, &wire[..taken]).1, End::Complete, "{}", wire.escape_ascii());
            assert_eq!(hyper(runtime, framing, &wire[..taken - 1]).1, End::Incomplete, "{}", wire.escape_ascii());
        }
        return Differs::Not;
    }
    match (end, hyper_end, before, culprit) {
        (End::Invalid, End::Complete | End::Incomplete | End::Invalid, Some(state::EXTENSION), Some(0))
            if hyper_payload.starts_with(&payload) =>
        {
            Differs::NulInExtension
        }
        (
            End::Invalid,
            End::Incomplete | End::Complete,
            Some(state::TRAILER_FIRST | state::TRAILER),
            Some(b'\n' | 0),
        ) if hyper_payload == payload => Differs::BareLfOrNulInTrailers,
        (End::Complete, End::Invalid, ..)
            if hyper_payload == payload
                && wire[..taken].ends_with(b"\r\n\r\n")
                && hyper(runtime, framing, &wire[..taken - 1]).1 == End::Incomplete =>
        {
            Differs::TrailersNotFields
        }
        _ => panic!(
            "parser: {end:?} after {taken}, {payload:?}; hyper: {hyper_end:?}, {hyper_payload:?}; {}",
            wire.escape_ascii()
        ),
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("runtime")
}

#[test]
fn hyper_differs_as_listed() {
    let runtime = runtime();
    let compare = |wire: &[u8]| compare(&runtime, Framing::chunked(), wire);
    assert_eq!(compare(b"1;\0\r\nx\r\n0\r\n\r\n"), Differs::NulInExtension);
    assert_eq!(compare(b"0\r\na: b\n\r\n\r\n"), Differs::BareLfOrNulInTrailers);
    assert_eq!(compare(b"0\r\n\n\r\n\r\n"), Differs::BareLfOrNulInTrailers);
    assert_eq!(compare(b"0\r\nno field\r\n\r\n"), Differs::TrailersNotFields);
    assert_eq!(compare(b"0\r\n folded: x\r\n\r\n"), Differs::TrailersNotFields);
    // hyper refuses the 101st field.
    let fields = [&b"0\r\n"[..], &b"a: b\r\n".repeat(101), b"\r\n"].concat();
    assert_eq!(read(Framing::chunked(), &fields), (fields.len(), Vec::new(), End::Complete));
    assert_eq!(hyper(&runtime, Framing::chunked(), &fields).1, End::Invalid);
    assert_eq!(compare(&[&b"0\r\n"[..], &b"a: b\r\n".repeat(100), b"\r\n"].concat()), Differs::Not);
    // hyper's limit is one byte less than 16 KiB, for trailers and for the extensions of all chunks together.
    let incomplete = (Vec::new(), End::Incomplete);
    assert_eq!(compare(&trailers(MAX_TRAILERS as usize - 1)), Differs::Not);
    assert_eq!(hyper(&runtime, Framing::chunked(), &trailers(MAX_TRAILERS as usize)).1, End::Invalid);
    let long = trailers(MAX_TRAILERS as usize);
    assert_eq!(hyper(&runtime, Framing::chunked(), &long[..long.len() - 1]), incomplete);
    let line = chunk_line(MAX_CHUNK_LINE as usize + 1);
    let body = [&line[..], b"x\r\n0\r\n\r\n"].concat();
    assert_eq!(
        (read(Framing::chunked(), &body).2, hyper(&runtime, Framing::chunked(), &body).1),
        (End::Invalid, End::Complete)
    );
    let many = [&[&chunk_line(4096)[..], b"x\r\n"].concat().repeat(5)[..], b"0\r\n\r\n"].concat();
    assert_eq!(
        (read(Framing::chunked(), &many).2, hyper(&runtime, Framing::chunked(), &many).1),
        (End::Complete, End::Invalid)
    );
}

/// A byte that is inserted, changed or removed.
#[derive(Clone, Debug)]
struct Mutation(u8, prop::sample::Index, u8);

fn mutate(wire: &mut Vec<u8>, Mutation(kind, at, byte): &Mutation) {
    let at = at.index(wire.len() + 1);
    match kind {
        0 => wire.insert(at, *byte),
        _ if at == wire.len() => {}
        1 => wire[at] = *byte,
        _ => drop(wire.remove(at)),
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let byte = prop_oneof![any::<u8>(), prop::sample::select(&b"\r\n\0;: \t019afF\"x-+"[..])];
    (0..3u8, any::<prop::sample::Index>(), byte).prop_map(|(kind, at, byte)| Mutation(kind, at, byte))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hyper_reads_valid_bodies_alike(body in body(200, 5), after in prop::option::of("[ -~\r\n]{1,20}")) {
        let runtime = runtime();
        let mut wire = body.wire.clone();
        if !body.framing.is_until_close() {
            wire.extend_from_slice(after.unwrap_or_default().as_bytes());
        }
        prop_assert_eq!(compare(&runtime, body.framing, &wire), Differs::Not);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hyper_reads_mutated_bodies_alike(body in body(12, 3), mutations in proptest::collection::vec(mutation(), 1..4), after in "[a-f0-9\r\n]{0,20}") {
        let mut wire = body.wire.clone();
        mutations.iter().for_each(|mutation| mutate(&mut wire, mutation));
        wire.extend_from_slice(after.as_bytes());
        compare(&runtime(), body.framing, &wire);
    }
}
