//! Decodes one document in each coding. The files in `testdata` were made with the zstd command line and Node.js's zlib
//! and brotli.

use std::{
    io::{Read as _, Write as _},
    sync::LazyLock,
};

use flate2::{
    Compression,
    read::MultiGzDecoder,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use http::{HeaderName, HeaderValue};
use prometheus_client::metrics::gauge::Gauge;
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::*;

const GZIP: &[u8] = include_bytes!("testdata/body.gz");
const BROTLI: &[u8] = include_bytes!("testdata/body.br");
const ZSTD: &[u8] = include_bytes!("testdata/body.zst");
const FAST: &[u8] = include_bytes!("testdata/fast.zst");
const UNCHECKED: &[u8] = include_bytes!("testdata/nocheck.zst");
/// Needs a window of 128 MiB.
const LONG: &[u8] = include_bytes!("testdata/long.zst");

fn document() -> Vec<u8> {
    let mut document = Vec::new();
    MultiGzDecoder::new(GZIP).read_to_end(&mut document).unwrap();
    document
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn raw(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Decodes `bytes`, pushed in pieces of `cut` bytes, and checks the size of each output piece.
fn within(
    codings: &[Coding],
    bytes: &[u8],
    cut: usize,
    limit: u64,
    memory: &Arc<Budget>,
) -> Result<Vec<u8>, CodingError> {
    let mut decoder = Decoder::new(codings, limit, memory);
    let mut document = Vec::new();
    let mut drain = |decoder: &mut Decoder| {
        while let Some(piece) = decoder.step()? {
            assert!((1..=PIECE).contains(&piece.len()));
            document.extend_from_slice(&piece);
        }
        Ok(())
    };
    for piece in bytes.chunks(cut) {
        decoder.push(piece);
        drain(&mut decoder)?;
    }
    decoder.end();
    drain(&mut decoder)?;
    Ok(document)
}

fn decode(codings: &[Coding], bytes: &[u8], cut: usize) -> Result<Vec<u8>, CodingError> {
    within(codings, bytes, cut, 1 << 30, &Budget::unlimited())
}

/// One sample of each coding, and some combinations.
fn samples() -> &'static [(Vec<Coding>, Vec<u8>)] {
    static SAMPLES: LazyLock<Vec<(Vec<Coding>, Vec<u8>)>> = LazyLock::new(made);
    &SAMPLES
}

fn made() -> Vec<(Vec<Coding>, Vec<u8>)> {
    use Coding::{Brotli, Deflate, Gzip, Zstd};
    let document = document();
    vec![
        (vec![Gzip], GZIP.to_vec()),
        (vec![Deflate], zlib(&document)),
        (vec![Deflate], raw(&document)),
        (vec![Brotli], BROTLI.to_vec()),
        (vec![Zstd], ZSTD.to_vec()),
        (vec![Zstd], FAST.to_vec()),
        (vec![Zstd], UNCHECKED.to_vec()),
        (vec![Brotli, Gzip], gzip(BROTLI)),
        (vec![Gzip, Zstd], compress_to_vec(GZIP, CompressionLevel::Fastest)),
        (vec![Zstd, Deflate, Gzip], gzip(&zlib(ZSTD))),
    ]
}

#[test]
fn coded_document_decodes_the_same_in_any_cuts() {
    let document = document();
    assert!(document.starts_with(b"{\"model\":\"llama-3.1-8b\"") && document.len() > PIECE);
    for (codings, bytes) in samples() {
        for cut in [7, 1000, bytes.len()] {
            assert!(decode(codings, bytes, cut).unwrap() == document, "{codings:?} by {cut}");
        }
    }
}

#[test]
fn concatenated_members_and_frames_decode() {
    let document = document();
    let (begin, rest) = document.split_at(10_000);
    let gzipped = [gzip(begin), gzip(b""), gzip(rest)].concat();
    assert!(decode(&[Coding::Gzip], &gzipped, 100).unwrap() == document);
    let frame = |bytes: &[u8]| compress_to_vec(bytes, CompressionLevel::Fastest);
    let skippable = [&0x184d_2a53_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"abc"].concat();
    let frames = [skippable.clone(), frame(begin), skippable, frame(rest)].concat();
    assert!(decode(&[Coding::Zstd], &frames, 100).unwrap() == document);
}

#[test]
fn truncated_body_is_an_error_at_any_cut() {
    for (codings, bytes) in samples() {
        for length in (0..bytes.len()).step_by(397).chain([bytes.len() - 1]) {
            let error = decode(codings, &bytes[..length], 1000).unwrap_err();
            assert!(matches!(error, CodingError::Truncated { .. }), "{codings:?} cut at {length}: {error}");
        }
    }
}

#[test]
fn body_in_another_format_is_an_error() {
    let json = br#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
    for coding in [Coding::Gzip, Coding::Deflate, Coding::Brotli, Coding::Zstd] {
        let error = decode(&[coding], json, 10).unwrap_err();
        assert!(matches!(error, CodingError::Corrupt { .. } | CodingError::Truncated { .. }), "{coding:?}: {error}");
    }
    for (codings, bytes) in samples() {
        let error = decode(codings, &[&bytes[..], b"more"].concat(), 1000).unwrap_err();
        let error = matches!(error, CodingError::Corrupt { .. } | CodingError::Truncated { .. });
        assert!(error, "{codings:?} with data after its end");
    }
}

#[test]
fn wrong_checksum_is_an_error() {
    let last_but = |bytes: &[u8], back: usize| {
        let mut bytes = bytes.to_vec();
        let at = bytes.len() - back;
        bytes[at] ^= 1;
        bytes
    };
    // gzip ends with the checksum and then the length.
    let rows = [
        (Coding::Gzip, last_but(GZIP, 8)),
        (Coding::Gzip, last_but(GZIP, 1)),
        (Coding::Deflate, last_but(&zlib(&document()), 1)),
        (Coding::Zstd, last_but(ZSTD, 1)),
    ];
    for (coding, bytes) in rows {
        let error = decode(&[coding], &bytes, 1000).unwrap_err();
        assert!(matches!(error, CodingError::Corrupt { .. }), "{coding:?}: {error}");
    }
}

/// A few kilobytes that expand to gigabytes fail at the limit and are not decoded further.
#[test]
fn decompression_bomb_fails_at_the_limit() {
    const LIMIT: u64 = 1 << 20;
    let zeros = vec![0; 8 << 20];
    // Blocks that each repeat one byte 128 Ki times, in a frame with a window of 128 KiB.
    let block = ((128_u32 << 10) << 3 | 1 << 1).to_le_bytes();
    let rle = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3][..], &[&block[..3], b"0"].concat().repeat(10_000)].concat();
    let rows: [(&[Coding], Vec<u8>); 5] = [
        (&[Coding::Gzip], gzip(&zeros)),
        (&[Coding::Deflate], zlib(&zeros)),
        (&[Coding::Zstd], rle.clone()),
        (&[Coding::Gzip, Coding::Gzip], gzip(&gzip(&zeros))),
        (&[Coding::Zstd, Coding::Gzip], gzip(&rle)),
    ];
    for (codings, bytes) in rows {
        let mut decoder = Decoder::new(codings, LIMIT, &Budget::unlimited());
        decoder.push(&bytes);
        let mut steps = 0;
        let error = loop {
            match decoder.step() {
                Ok(Some(_)) => steps += 1,
                Ok(None) => panic!("{codings:?}"),
                Err(error) => break error,
            }
        };
        assert_eq!(error, CodingError::TooLarge { limit: LIMIT }, "{codings:?}");
        assert!(steps <= LIMIT as usize / 1000, "{steps}");
    }
}

#[test]
fn windows_are_counted_and_bounded() {
    let error = decode(&[Coding::Zstd], LONG, 1000).unwrap_err();
    assert!(error.to_string().contains("a window of 134217728 bytes"), "{error}");
    for (codings, bytes) in samples() {
        let gauge = Gauge::default();
        let small = Budget::new(1000, gauge.clone());
        assert_eq!(within(codings, bytes, 1000, 1 << 30, &small), Err(CodingError::NoRoom), "{codings:?}");
        let large = Budget::new(64 << 20, gauge.clone());
        let mut decoder = Decoder::new(codings, 1 << 30, &large);
        decoder.push(bytes);
        decoder.step().unwrap();
        assert!(gauge.get() >= (STATE * codings.len() as u64) as i64, "{codings:?}");
        drop(decoder);
        assert_eq!(gauge.get(), 0, "{codings:?}");
    }
}

#[test]
fn content_encoding_is_parsed() {
    use Coding::{Brotli, Deflate, Gzip, Zstd};
    let rows: [(&[&str], Option<&[Coding]>); 17] = [
        (&[], Some(&[])),
        (&[""], Some(&[])),
        (&["identity"], Some(&[])),
        (&["Identity, ,IDENTITY"], Some(&[])),
        (&["gzip"], Some(&[Gzip])),
        (&["GZip"], Some(&[Gzip])),
        (&["x-gzip"], Some(&[Gzip])),
        (&[" deflate\t"], Some(&[Deflate])),
        (&["BR"], Some(&[Brotli])),
        (&["zstd"], Some(&[Zstd])),
        (&["gzip, br"], Some(&[Gzip, Brotli])),
        (&["gzip", "identity,zstd"], Some(&[Gzip, Zstd])),
        (&["gzip,gzip,gzip"], Some(&[Gzip, Gzip, Gzip])),
        (&["gzip,gzip,gzip,gzip"], None),
        (&["compress"], None),
        (&["gzip, aes128gcm"], None),
        (&["gzip;q=1"], None),
    ];
    for (lines, expected) in rows {
        let name = HeaderName::from_static("content-encoding");
        let mut map = HeaderMap::new();
        for line in lines {
            map.append(&name, HeaderValue::from_str(line).unwrap());
        }
        match (Codings::of(&map), expected) {
            (Codings::Known(found), Some(expected)) => assert_eq!(found, expected, "{lines:?}"),
            (Codings::Unknown(_), None) => {}
            (found, _) => panic!("{found:?} in {lines:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A corrupted body yields an error or a document within the limit.
    #[test]
    fn broken_bodies_never_panic(
        sample in 0..10_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in 1..5000_usize,
    ) {
        let (codings, mut bytes) = samples()[sample].clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let decoded = within(&codings, &bytes, cut, 1 << 20, &Budget::unlimited());
        prop_assert!(decoded.is_err() || decoded.is_ok_and(|document| document.len() <= 1 << 20));
    }

    #[test]
    fn random_bodies_never_panic(sample in 0..10_usize, bytes in prop::collection::vec(any::<u8>(), 0..300), keep in 0..20_usize) {
        let (codings, begin) = &samples()[sample];
        let bytes = [&begin[..keep], &bytes].concat();
        let _ = within(codings, &bytes, 100, 1 << 20, &Budget::unlimited());
    }
}
