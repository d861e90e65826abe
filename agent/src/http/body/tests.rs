//! Tests reading and replaying request bodies, and their budgets.

use proptest::prelude::*;

use super::*;
use crate::{config::Limits, metrics::Metrics};

/// Budgets that are large enough for every test.
fn bodies() -> Arc<Bodies> {
    budgets(1 << 30, 1 << 30).0
}

fn budgets(memory: u64, spill: u64) -> (Arc<Bodies>, Arc<Metrics>) {
    let limits = Limits { total_body_bytes: memory, total_spill_bytes: spill, ..Limits::default() };
    let metrics = Metrics::new(&[]);
    (Bodies::new(&limits, &metrics), metrics)
}

/// Decodes `wire` in pieces of `cut` bytes; returns the payload and the bytes left after the body.
fn decode(wire: &[u8], body: RequestBody, limit: u64, cut: usize) -> Result<(Vec<u8>, Vec<u8>, bool), BodyError> {
    let mut reader = BodyReader::new(body, limit)?;
    let (mut buf, mut payload) = (BytesMut::new(), Vec::new());
    for piece in wire.chunks(cut.max(1)) {
        buf.extend_from_slice(piece);
        while let Decoded::Piece(piece) = reader.decode(&mut buf)? {
            assert!(!piece.is_empty());
            payload.extend_from_slice(&piece);
        }
    }
    Ok((payload, buf.to_vec(), reader.is_done()))
}

#[test]
fn reader_takes_exactly_the_body() {
    use RequestBody::{Chunked, Length, None};
    let table: &[(&str, RequestBody, &str, &str, bool)] = &[
        ("next", None, "", "next", true),
        ("next", Length(0), "", "next", true),
        ("hellonext", Length(5), "hello", "next", true),
        ("hel", Length(5), "hel", "", false),
        ("5\r\nhello\r\n0\r\n\r\nnext", Chunked, "hello", "next", true),
        ("5;a=\"b\"\r\nhello\r\n01\r\n!\r\n0;c\r\nt: u\r\n\r\nnext", Chunked, "hello!", "next", true),
        ("5\r\nhello\r\n0\r\n", Chunked, "hello", "", false),
    ];
    for (wire, body, payload, left, done) in table {
        for cut in 1..=wire.len() {
            let got = decode(wire.as_bytes(), *body, 100, cut).expect(wire);
            assert_eq!(got, (payload.as_bytes().to_vec(), left.as_bytes().to_vec(), *done), "{wire:?} by {cut}");
        }
    }
}

#[test]
fn malformed_bodies_are_refused_by_reason() {
    use RequestBody::{Chunked, Length};
    let extensions = format!("1;{}\r\na\r\n", "x".repeat(4000)).repeat(20);
    let long_line = format!("1;{}\r\n", "x".repeat(100_000));
    let trailers = format!("0\r\n{}\r\n", "a: b\r\n".repeat(100_000));
    let table: &[(&str, &str, RequestBody, u16, &str)] = &[
        ("declared too large", "", Length(31), 413, "body_too_large"),
        ("chunks too large", "5\r\nhello\r\n1a\r\nabcdefghijklmnopqrstuvwxyz", Chunked, 413, "body_too_large"),
        ("not a size", "x\r\n", Chunked, 400, "chunk"),
        ("negative size", "-1\r\n", Chunked, 400, "chunk"),
        ("hexadecimal prefix", "0x1\r\na\r\n", Chunked, 400, "chunk"),
        ("no size", "\r\n", Chunked, 400, "chunk"),
        ("2^64", "10000000000000000\r\n", Chunked, 400, "chunk"),
        ("LF alone", "1\na\r\n", Chunked, 400, "chunk"),
        ("chunk longer than its size", "1\r\nab\r\n", Chunked, 400, "chunk"),
        ("line without end", &long_line, Chunked, 400, "chunk"),
        ("trailers without end", &trailers, Chunked, 400, "chunk"),
        ("extensions without end", &extensions, Chunked, 400, "chunk_overhead"),
    ];
    for (trick, wire, body, status, reason) in table {
        for cut in [1, 7, 1 << 20] {
            let error = decode(wire.as_bytes(), *body, 30, cut).expect_err(trick);
            assert_eq!((error.status().as_u16(), error.reason()), (*status, *reason), "{trick} by {cut}: {error}");
        }
    }
}

proptest! {
    #[test]
    fn chunks_cut_anywhere_give_the_payload(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..20), cut in 1_usize..100
    ) {
        let mut wire = Vec::new();
        for chunk in &chunks {
            wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            wire.extend_from_slice(chunk);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(b"0\r\n\r\n");
        let (payload, left, done) = decode(&wire, RequestBody::Chunked, 10_000, cut).unwrap();
        prop_assert!(done && left.is_empty());
        prop_assert_eq!(payload, chunks.concat());
    }

    #[test]
    fn reader_never_panics(wire in prop::collection::vec(any::<u8>(), 0..300), cut in 1_usize..300) {
        let _ = decode(&wire, RequestBody::Chunked, 100, cut);
    }
}

/// `length` bytes derived from their position.
fn pattern(length: usize) -> Bytes {
    (0..length).map(|at| (at % 251) as u8).collect()
}

async fn read(body: &ReplayBody) -> Vec<u8> {
    let (mut pieces, mut all) = (body.pieces(), Vec::new());
    while let Some(piece) = pieces.next().await.unwrap() {
        assert!((1..=PIECE).contains(&piece.len()));
        all.extend_from_slice(&piece);
    }
    assert!(pieces.next().await.unwrap().is_none());
    all
}

#[tokio::test]
async fn replay_returns_the_same_bytes_from_memory_and_file() {
    // (length, appended in pieces of, memory, expected in the file)
    let table = [
        (0, 1, 0, 0),
        (1, 1, 0, 0),
        (PIECE, 1000, 0, PIECE),
        (PIECE, 1000, PIECE, 0),
        (PIECE + 1, PIECE + 1, PIECE, 0),
        (3 * PIECE, 100_000, PIECE, 2 * PIECE),
        (10 * PIECE + 77, 30_001, 3 * PIECE + 5, 7 * PIECE),
        (10 * PIECE + 77, usize::MAX, 0, 10 * PIECE),
    ];
    for (length, step, memory, filed) in table {
        let (bytes, mut body) = (pattern(length), ReplayBody::new(memory, 1 << 20, &bodies()));
        for piece in bytes.chunks(step) {
            body.append(Bytes::copy_from_slice(piece)).await.unwrap();
        }
        assert_eq!((body.len(), body.filed()), (length as u64, filed as u64));
        for _ in 0..3 {
            assert!(read(&body).await == bytes, "{length} bytes by {step}, {memory} in memory");
        }
    }
}

#[tokio::test]
async fn body_can_grow_after_a_replay() {
    let (bytes, mut body) = (pattern(3 * PIECE), ReplayBody::new(PIECE, 1 << 20, &bodies()));
    for piece in bytes.chunks(PIECE / 2) {
        body.append(Bytes::copy_from_slice(piece)).await.unwrap();
        assert!(read(&body).await == bytes[..body.len() as usize]);
    }
}

#[tokio::test]
async fn append_beyond_the_limit_is_refused() {
    let mut body = ReplayBody::new(0, 10, &bodies());
    body.append(Bytes::from_static(b"0123456789")).await.unwrap();
    let error = body.append(Bytes::from_static(b"!")).await.unwrap_err();
    assert_eq!((error.status(), body.len()), (StatusCode::PAYLOAD_TOO_LARGE, 10));
}

#[tokio::test]
async fn one_byte_pieces_do_not_keep_their_buffers() {
    let mut body = ReplayBody::new(PIECE, 1 << 20, &bodies());
    for _ in 0..1000 {
        let buffer = Bytes::from(vec![7; 4096]);
        body.append(buffer.slice(..1)).await.unwrap();
        assert!(buffer.is_unique());
    }
}

#[tokio::test]
async fn same_bytes_compare_equal_in_any_pieces() {
    let mut body = ReplayBody::new(1 << 20, 1 << 20, &bodies());
    let bytes: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    for piece in bytes.chunks(70_001) {
        body.append(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    let pieces: Vec<Bytes> = bytes.chunks(9973).map(Bytes::copy_from_slice).collect();
    assert!(body.is_same(&pieces).await.unwrap());
    assert!(!body.is_same(&pieces[1..]).await.unwrap());
    let mut other = bytes.clone();
    other[123_456] ^= 1;
    assert!(!body.is_same(&[other.clone().into()]).await.unwrap());
    let mut filed = ReplayBody::new(1000, 1 << 20, &bodies());
    filed.append(Bytes::from(bytes.clone())).await.unwrap();
    assert!(filed.filed() > 0 && filed.is_same(&pieces).await.unwrap());
    assert!(!filed.is_same(&[other.into()]).await.unwrap());
}

/// Bytes in memory and in files, by the metrics.
fn taken(metrics: &Metrics) -> (u64, u64) {
    let text = metrics.encode();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("penstock_request_body_{name}_bytes ")));
        line.expect(name).parse().unwrap()
    };
    (value("memory"), value("spill"))
}

#[tokio::test]
async fn bodies_spill_beyond_the_memory_budget_and_are_refused_beyond_the_spill_budget() {
    let piece = 16 * 1024;
    let (bodies, metrics) = budgets(2 * PIECE as u64, 3 * PIECE as u64);
    let body = || ReplayBody::new(1 << 20, 1 << 20, &bodies);
    let mut all: Vec<ReplayBody> = Vec::new();
    let refused = 'full: loop {
        let bytes = pattern(PIECE);
        let mut body = body();
        for part in bytes.chunks(piece) {
            if let Err(error) = body.append(Bytes::copy_from_slice(part)).await {
                break 'full error;
            }
        }
        all.push(body);
    };
    assert_eq!((refused.status().as_u16(), refused.reason()), (503, "bodies_full"));
    assert_eq!(all.len(), 5);
    assert_eq!(taken(&metrics), (2 * PIECE as u64, 3 * PIECE as u64));
    assert_eq!(all.iter().map(ReplayBody::filed).sum::<u64>(), 3 * PIECE as u64);
    for body in &all {
        assert_eq!(read(body).await, pattern(PIECE));
        assert!(body.is_same(&[pattern(PIECE)]).await.unwrap());
        assert_eq!(*body.sha256().await.unwrap(), *digest::digest(&digest::SHA256, &pattern(PIECE)).as_ref());
    }
    // Released memory is available to the next body.
    drop(all[0].take());
    let mut next = body();
    next.append(pattern(PIECE)).await.unwrap();
    assert_eq!((next.filed(), taken(&metrics).0), (0, 2 * PIECE as u64));
    drop((all, next));
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while taken(&metrics) != (0, 0) {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", taken(&metrics));
        tokio::task::yield_now().await;
    }
    let text = metrics.encode();
    for line in [
        r#"penstock_request_bodies_refused_total{reason="files"} 1"#,
        r#"penstock_request_bodies_spilled_total{reason="total"} 3"#,
    ] {
        assert!(text.lines().any(|one| one == line), "{line} in {text}");
    }
}

/// A body is complete however small its memory is, and reading may begin at any offset.
#[tokio::test]
async fn body_is_complete_when_memory_runs_out() {
    for memory in [0, 1024, 20_000, 65_536, 100_000, 140_000] {
        let (bodies, metrics) = budgets(memory, 1 << 30);
        let (bytes, mut body) = (pattern(200_000), ReplayBody::new(80_000, 1 << 20, &bodies));
        for part in bytes.chunks(7001) {
            body.append(Bytes::copy_from_slice(part)).await.unwrap();
            assert!(taken(&metrics).0 <= memory);
        }
        assert_eq!(read(&body).await, bytes, "{memory}");
        for at in (0..bytes.len()).step_by(9973) {
            let piece = body.piece_at(at as u64).await.unwrap().unwrap();
            assert_eq!(piece, bytes[at..at + piece.len()], "{memory}");
        }
        assert!(body.piece_at(200_000).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn counted_memory_equals_allocated_memory() {
    let (bodies, metrics) = budgets(1 << 30, 1 << 30);
    let mut body = ReplayBody::new(1 << 20, 1 << 20, &bodies);
    let mut length = 0;
    for part in [1, 500, 3000, 3000, 40_000, 60_000, 100] {
        body.append(pattern(part)).await.unwrap();
        length += part;
        let allocated = body.blocks.len() * PIECE + body.tail.capacity();
        assert_eq!(taken(&metrics).0, allocated as u64, "at {length}");
        assert!(allocated <= (2 * length).max(LEAST) && allocated >= length);
    }
}

/// In memory, in a file, and in both; the last part of each is a tail.
#[tokio::test]
async fn body_in_memory_counts_once_more_until_it_is_gone_or_is_refused() {
    let whole: Vec<u8> = (0..PIECE * 2 + 1000).map(|at| (at % 251) as u8).collect();
    for memory in [0, PIECE, PIECE * 4] {
        let (bodies, _) = budgets(PIECE as u64 * 8, 1 << 30);
        let mut body = ReplayBody::new(memory, 1 << 30, &bodies);
        body.append(whole.clone().into()).await.unwrap();
        let pieces = body.in_memory().await.unwrap().expect("there is room");
        assert_eq!(pieces.concat(), whole, "{memory}");
        drop(body);
        let room = bodies.memory.limit() - whole.len() as u64;
        let mut rest = bodies.memory.share();
        assert!(!rest.grow(room + 1) && rest.grow(room), "{memory}");
        drop((pieces, rest));

        let mut body = ReplayBody::new(memory, 1 << 30, &bodies);
        body.append(whole.clone().into()).await.unwrap();
        let mut others = bodies.memory.share();
        while others.grow(1000) {}
        assert_eq!(body.in_memory().await.unwrap(), None, "{memory}");
    }
}
