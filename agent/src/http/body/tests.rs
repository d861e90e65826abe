use proptest::prelude::*;

use super::*;

/// The payload of `wire`, given in pieces of `cut` bytes, and what is left behind the body.
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
fn takes_the_body_and_nothing_else() {
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
fn refuses_each_trick_by_name() {
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
    fn any_chunks_in_any_cuts_give_the_payload(
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
    fn never_panics(wire in prop::collection::vec(any::<u8>(), 0..300), cut in 1_usize..300) {
        let _ = decode(&wire, RequestBody::Chunked, 100, cut);
    }
}

/// `length` bytes that tell their position.
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
async fn replays_the_same_bytes_from_memory_and_file() {
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
        let (bytes, mut body) = (pattern(length), ReplayBody::new(memory, 1 << 20));
        for piece in bytes.chunks(step) {
            body.append(Bytes::copy_from_slice(piece)).await.unwrap();
        }
        assert_eq!((body.len(), body.filed()), (length as u64, filed as u64));
        assert_eq!(body.is_empty(), length == 0);
        for _ in 0..3 {
            assert!(read(&body).await == bytes, "{length} bytes by {step}, {memory} in memory");
        }
    }
}

#[tokio::test]
async fn goes_on_growing_after_a_replay() {
    let (bytes, mut body) = (pattern(3 * PIECE), ReplayBody::new(PIECE, 1 << 20));
    for piece in bytes.chunks(PIECE / 2) {
        body.append(Bytes::copy_from_slice(piece)).await.unwrap();
        assert!(read(&body).await == bytes[..body.len() as usize]);
    }
}

#[tokio::test]
async fn refuses_what_exceeds_the_limit() {
    let mut body = ReplayBody::new(0, 10);
    body.append(Bytes::from_static(b"0123456789")).await.unwrap();
    let error = body.append(Bytes::from_static(b"!")).await.unwrap_err();
    assert_eq!((error.status(), body.len()), (StatusCode::PAYLOAD_TOO_LARGE, 10));
}

#[tokio::test]
async fn one_byte_pieces_do_not_hold_their_buffers() {
    let mut body = ReplayBody::new(PIECE, 1 << 20);
    for _ in 0..1000 {
        let buffer = Bytes::from(vec![7; 4096]);
        body.append(buffer.slice(..1)).await.unwrap();
        assert!(buffer.is_unique());
    }
}
