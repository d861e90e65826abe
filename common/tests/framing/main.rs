//! The framing parser compared with tables, with itself for every cut of the bytes, with hyper, and with httparse.

mod against_hyper;
#[path = "../support/random.rs"]
mod random;
#[path = "../support/walk.rs"]
mod walk;

use penstock_common::framing::{Framing, MAX_CHUNK_LINE, MAX_TRAILERS, state};
use proptest::prelude::*;

use random::Random;

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    Incomplete,
    Invalid,
}

/// The message's length, its payload, and how it ends if the peer closes after `wire`.
fn read(mut framing: Framing, wire: &[u8]) -> (usize, Vec<u8>, End) {
    let (mut at, mut payload) = (0, Vec::new());
    while at < wire.len() && !framing.is_done() && !framing.is_invalid() {
        let (taken, data) = framing.next(&wire[at..]);
        assert!(taken > 0, "no progress at {at}");
        payload.extend_from_slice(data.unwrap_or_default());
        at += taken;
    }
    let end = match framing {
        framing if framing.is_invalid() => End::Invalid,
        framing if framing.may_close() => End::Complete,
        _ => End::Incomplete,
    };
    (at, payload, end)
}

// Tables

fn chunk_line(len: usize) -> Vec<u8> {
    let mut line = b"1;".to_vec();
    line.resize(len - 2, b'x');
    line.extend_from_slice(b"\r\n");
    line
}

/// A body whose trailer section, including the last CRLF, is `len` bytes long.
fn trailers(len: usize) -> Vec<u8> {
    let mut body = b"0\r\nx:".to_vec();
    body.resize(3 + len - 4, b'y');
    body.extend_from_slice(b"\r\n\r\n");
    body
}

#[test]
fn whole_bodies_end_at_their_last_byte() {
    let line = [&chunk_line(MAX_CHUNK_LINE as usize)[..], b"x\r\n0\r\n\r\n"].concat();
    let cases: [(&[u8], &[u8]); 19] = [
        (b"0\r\n\r\n", b""),
        (b"000\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"00000000000000000000005\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b"a\r\n0123456789\r\nB\r\n01234567890\r\n0\r\n\r\n", b"012345678901234567890"),
        (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
        (b"1;a\r\nx\r\n0;b\r\n\r\n", b"x"),
        (b"1 ; a = b\r\nx\r\n0\r\n\r\n", b"x"),
        (b"1\t \t\r\nx\r\n0 \r\n\r\n", b"x"),
        (b"1;a=\"b;c \\\" 5\";d\r\nx\r\n0\r\n\r\n", b"x"),
        (b"1;\r\nx\r\n0\r\n\r\n", b"x"),
        (b"1;\x80\xff\r\nx\r\n0\r\n\r\n", b"x"),
        (b"0\r\na: b\r\n\r\n", b""),
        (b"0\r\na: b\r\nc: d\r\n\r\n", b""),
        (b"0\r\na:\r\n\r\n", b""),
        (b"1\r\nx\r\n0\r\nchecksum: 1234\r\n\r\n", b"x"),
        (&line, b"x"),
        (&trailers(MAX_TRAILERS as usize), b""),
        (&trailers(MAX_CHUNK_LINE as usize + 100), b""),
    ];
    for (body, payload) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
        let followed = [body, b"HTTP/1.1 200 OK\r\n"].concat();
        assert_eq!(read(Framing::chunked(), &followed), (body.len(), payload.to_vec(), End::Complete), "{shown}");
        for short in 0..body.len() {
            let (taken, _, end) = read(Framing::chunked(), &body[..short]);
            assert_eq!((taken, end), (short, End::Incomplete), "{shown} cut at {short}");
        }
    }
}

#[test]
fn broken_bodies_are_invalid_at_their_first_wrong_byte() {
    let line = chunk_line(MAX_CHUNK_LINE as usize + 1);
    let zeros = vec![b'0'; MAX_CHUNK_LINE as usize + 1];
    let long = trailers(MAX_TRAILERS as usize + 1);
    // The bytes, and how many of them are taken; the last one taken is the wrong one.
    let cases: [(&[u8], usize); 27] = [
        (b"\r\n", 1),
        (b"\n", 1),
        (b" 5\r\n", 1),
        (b";a\r\n", 1),
        (b"g\r\n", 1),
        (b"-1\r\n", 1),
        (b"+1\r\n", 1),
        (b"0x5\r\n", 2),
        (b"5\n", 2),
        (b"5\r\r\n", 3),
        (b"5 5\r\n", 3),
        (b"5 \n", 3),
        (b"5;a\n", 4),
        (b"5;\0", 3),
        (b"5;a\rb", 5),
        (b"1\r\nx\n", 5),
        (b"1\r\nxy", 5),
        (b"1\r\nx\rz", 6),
        (b"1\r\nx\r\n\r\n", 7),
        (b"0\r\n\n", 4),
        (b"0\r\n\rx", 5),
        (b"0\r\na: b\n", 8),
        (b"0\r\na: b\rc", 9),
        (b"0\r\na\0", 5),
        (b"10000000000000000\r\n", 17),
        (&line, line.len()),
        (&long, long.len()),
    ];
    for (body, culprit) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]);
        let (taken, _, end) = read(Framing::chunked(), &[body, b"5\r\nhello\r\n0\r\n\r\n"].concat());
        assert_eq!((taken, end), (culprit, End::Invalid), "{shown}");
    }
    assert_eq!(read(Framing::chunked(), &zeros).2, End::Invalid);
}

#[test]
fn largest_chunk_size_is_parsed() {
    let mut framing = Framing::chunked();
    framing.feed(b"fFfFfFfFfFfFfFfF\r\n");
    assert_eq!((framing.left, framing.state, framing.chunks), (u64::MAX, state::CHUNK, 1));
    assert_eq!(framing.skip(u64::MAX - 1), u64::MAX - 1);
    assert_eq!((framing.left, framing.state), (1, state::CHUNK));
    assert_eq!(framing.skip(u64::MAX), 1);
    assert_eq!(framing.state, state::CHUNK_CR);
}

#[test]
fn bodies_by_length_and_until_close_end_there() {
    for (framing, wire, expected) in [
        (Framing::none(), "after", (0, "", End::Complete)),
        (Framing::length(0), "after", (0, "", End::Complete)),
        (Framing::length(3), "abcdef", (3, "abc", End::Complete)),
        (Framing::length(3), "ab", (2, "ab", End::Incomplete)),
        (Framing::until_close(), "all of it", (9, "all of it", End::Complete)),
        (Framing::until_close(), "", (0, "", End::Complete)),
        (Framing::chunked(), "", (0, "", End::Incomplete)),
    ] {
        assert_eq!(read(framing, wire.as_bytes()), (expected.0, expected.1.as_bytes().to_vec(), expected.2), "{wire}");
    }
    assert!(Framing::until_close().is_until_close() && !Framing::until_close().is_done());
}

#[test]
fn every_state_is_reached_by_its_bytes() {
    use state::*;
    let states = [SIZE, SIZE_BLANK, EXTENSION, SIZE_LF, CHUNK, CHUNK_CR, CHUNK_LF, SIZE_FIRST];
    let wire = b"1 ;\r\nx\r\n0\r\na\r\n\r\n";
    let states =
        [&states[..], &[SIZE, SIZE_LF, TRAILER_FIRST, TRAILER, TRAILER_LF, TRAILER_FIRST, END_LF, DONE]].concat();
    let mut framing = Framing::chunked();
    assert_eq!(wire.len(), states.len());
    for (at, state) in states.into_iter().enumerate() {
        assert_eq!(framing.feed(&wire[at..=at]), 1);
        assert_eq!(framing.state, state, "after byte {at}");
    }
}

// Generated bodies

#[derive(Clone, Debug)]
struct Body {
    framing: Framing,
    wire: Vec<u8>,
    payload: Vec<u8>,
}

fn chunked_body(chunks: &[(Vec<u8>, String, usize)], last: &str, trailers: &[(String, String)]) -> Body {
    let (mut wire, mut payload) = (Vec::new(), Vec::new());
    for (data, extension, zeros) in chunks {
        wire.extend_from_slice(format!("{}{:x}{extension}\r\n", "0".repeat(*zeros), data.len()).as_bytes());
        wire.extend_from_slice(data);
        wire.extend_from_slice(b"\r\n");
        payload.extend_from_slice(data);
    }
    wire.extend_from_slice(format!("0{last}\r\n").as_bytes());
    for (name, value) in trailers {
        wire.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    wire.extend_from_slice(b"\r\n");
    Body { framing: Framing::chunked(), wire, payload }
}

fn extension() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just(String::new()),
        1 => "[ \t]{1,3}",
        2 => "[ \t]{0,2};[ a-z]{0,5}(=[a-z0-9]{1,5})?",
        1 => "; ?[a-z]{1,5}=\"([ -!#-\\[\\]-~]|\\\\[ -~]){0,10}\"",
    ]
}

fn body(largest: usize, chunks: usize) -> impl Strategy<Value = Body> {
    let chunk = (proptest::collection::vec(any::<u8>(), 1..=largest), extension(), 0..3usize);
    let trailers = proptest::collection::vec(("[a-z]{1,8}", "[ -~]{0,20}"), 0..3);
    let chunked = (proptest::collection::vec(chunk, 0..=chunks), extension(), trailers)
        .prop_map(|(chunks, last, trailers)| chunked_body(&chunks, &last, &trailers));
    let plain = (proptest::collection::vec(any::<u8>(), 0..=largest), any::<bool>()).prop_map(|(payload, close)| {
        let framing = if close { Framing::until_close() } else { Framing::length(payload.len() as u64) };
        Body { framing, wire: payload.clone(), payload }
    });
    prop_oneof![4 => chunked, 1 => plain]
}

/// Feeds pieces that end at `cuts` to `next`, `feed`, and the kernel program's walk.
fn feed_pieces(framing: Framing, wire: &[u8], cuts: &[usize]) -> (usize, Framing) {
    let (mut framing, mut fed, mut walked) = (framing, framing, framing);
    let (mut from, mut total) = (0, 0);
    for &cut in cuts.iter().chain([&wire.len()]) {
        let piece = &wire[from..cut];
        let (over, mut whole) = (fed.is_done() || fed.is_invalid(), fed);
        let taken = fed.feed(piece);
        assert!(!over || taken == 0, "bytes taken after the end");
        let mut at = 0;
        while at < piece.len() && !framing.is_done() && !framing.is_invalid() {
            let (n, payload) = framing.next(&piece[at..]);
            assert!(n > 0 && payload.is_none_or(|payload| payload.len() == n));
            at += n;
        }
        assert_eq!((at, framing), (taken, fed), "next and feed");
        assert_eq!((walk::walk(&mut walked, piece, u32::MAX), walked), (taken, fed), "the walk and feed");
        let inside = taken == piece.len() && !fed.is_invalid();
        assert_eq!(walk::parse(&mut whole, piece, u32::MAX), inside, "the kernel program's result");
        total += taken;
        from = cut;
    }
    (total, framing)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn short_bodies_parse_alike_for_every_cut(body in body(12, 4)) {
        let followed = [&body.wire[..], b"after"].concat();
        let wire = if body.framing.is_until_close() { &body.wire } else { &followed };
        let (taken, payload, end) = read(body.framing, wire);
        prop_assert_eq!((taken, &payload, end), (body.wire.len(), &body.payload, End::Complete));
        let whole = feed_pieces(body.framing, wire, &[]);
        for cut in 0..=wire.len() {
            prop_assert_eq!(feed_pieces(body.framing, wire, &[cut]), whole);
        }
        let every: Vec<_> = (1..wire.len()).collect();
        prop_assert_eq!(feed_pieces(body.framing, wire, &every), whole);
        for short in 0..body.wire.len() {
            prop_assert_eq!(body.framing.is_until_close(), read(body.framing, &wire[..short]).2 == End::Complete);
        }
    }

    #[test]
    fn long_bodies_parse_alike_for_random_cuts(body in body(5000, 8), cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20)) {
        let wire = if body.framing.is_until_close() { body.wire.clone() } else { [&body.wire[..], b"after"].concat() };
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(wire.len() + 1)).collect();
        cuts.sort_unstable();
        let (taken, framing) = feed_pieces(body.framing, &wire, &cuts);
        prop_assert_eq!(taken, body.wire.len());
        prop_assert_eq!(framing.is_done(), !body.framing.is_until_close());
        prop_assert_eq!(read(body.framing, &wire).1, body.payload);
    }

    #[test]
    fn random_bytes_do_not_panic(wire in proptest::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"0123456789abcdefF\r\n;: \t"[..])], 0..200), from in 0..16u32, left in 0..40u64, line in any::<u32>(), cuts in proptest::collection::vec(0..200usize, 0..4)) {
        let mut framing = Framing::chunked();
        (framing.state, framing.line) = (from, line);
        framing.left = if matches!(from, state::LENGTH | state::CHUNK) { left + 1 } else { left };
        let mut cuts: Vec<_> = cuts.into_iter().filter(|&cut| cut <= wire.len()).collect();
        cuts.sort_unstable();
        let (taken, end) = feed_pieces(framing, &wire, &cuts);
        prop_assert!(taken <= wire.len());
        prop_assert!(taken == wire.len() || end.is_done() || end.is_invalid());
    }
}

// httparse

/// Reads a chunked body with httparse's chunk-size lines, and trailers line by line.
fn oracle(wire: &[u8]) -> (usize, Vec<u8>, End) {
    let (mut at, mut payload) = (0, Vec::new());
    loop {
        let size = match httparse::parse_chunk_size(&wire[at..]) {
            Ok(httparse::Status::Complete((taken, size))) => {
                at += taken;
                size
            }
            Ok(httparse::Status::Partial) => return (wire.len(), payload, End::Incomplete),
            Err(_) => return (at, payload, End::Invalid),
        };
        if size == 0 {
            break;
        }
        let rest = &wire[at..];
        let taken = usize::try_from(size).unwrap_or(usize::MAX).min(rest.len());
        payload.extend_from_slice(&rest[..taken]);
        at += taken;
        match &wire[at..] {
            [] | [b'\r'] => return (wire.len(), payload, End::Incomplete),
            [b'\r', b'\n', ..] => at += 2,
            _ => return (at, payload, End::Invalid),
        }
    }
    loop {
        let Some(len) = wire[at..].iter().position(|&byte| matches!(byte, b'\r' | b'\n' | 0)) else {
            return (wire.len(), payload, End::Incomplete);
        };
        match &wire[at + len..] {
            [b'\r'] => return (wire.len(), payload, End::Incomplete),
            [b'\r', b'\n', ..] => at += len + 2,
            _ => return (at + len, payload, End::Invalid),
        }
        if len == 0 {
            return (at, payload, End::Complete);
        }
    }
}

/// Whether httparse may read these bytes differently. Such a difference cannot move the end of a message that both accept.
fn httparse_differs(wire: &[u8], taken: usize) -> bool {
    let mut framing = Framing::chunked();
    let mut digits = 0;
    for (at, &byte) in wire[..taken].iter().enumerate() {
        let before = framing.state;
        framing.feed(&[byte]);
        digits = if framing.state == state::SIZE { digits + 1 } else { 0 };
        let last = at + 1 == taken && framing.is_invalid();
        // More than 16 digits, with leading zeros; a line without a digit, which httparse reads as 0; LF and NUL in an extension.
        if digits > 16
            || (last && before == state::SIZE_FIRST && matches!(byte, b'\r' | b';' | b' ' | b'\t'))
            || (last && before == state::EXTENSION && matches!(byte, b'\n' | 0))
        {
            return true;
        }
    }
    false
}

#[test]
fn httparse_reads_chunk_sizes_alike() {
    let iterations =
        std::env::var("PENSTOCK_FUZZ_ITERATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_500_000u64);
    let (mut complete, mut invalid, mut different) = (0, 0, 0);
    for seed in 0..iterations {
        let mut random = Random::new(seed);
        let mut wire = Vec::new();
        for _ in 0..random.within(0, 3) {
            let len = random.within(1, 20);
            let extension = random.pick(&["", "", " ", "\t ;a", ";a=\"b;\""]);
            wire.extend_from_slice(format!("{len:x}{extension}\r\n").as_bytes());
            wire.extend((0..len).map(|_| random.next() as u8));
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(random.pick(&["0\r\n\r\n", "0\r\na: b\r\n\r\n", "00000 ;x\r\n\r\n"]).as_bytes());
        wire.extend_from_slice(random.pick(&["", "0\r\n\r\n", "5\r\n"]).as_bytes());
        while wire.len() > 1 && random.one_in(2) {
            let at = random.within(0, wire.len() - 1);
            let byte = random.pick(b"\r\n\0;: \t019afF\"x-+\xff");
            match random.within(0, 3) {
                0 => wire[at] = byte,
                1 => wire.insert(at, byte),
                2 => wire[at] ^= 1 << random.within(0, 7),
                _ => drop(wire.remove(at)),
            }
        }
        let (taken, payload, end) = read(Framing::chunked(), &wire);
        let (their_taken, their_payload, their_end) = oracle(&wire);
        // The parsers may report the wrong byte at different places, but must agree about the end.
        let same = end == their_end && payload == their_payload && (end != End::Complete || taken == their_taken);
        assert!(
            same || httparse_differs(&wire, taken),
            "seed {seed}: {}: parser {end:?} after {taken}, httparse {their_end:?} after {their_taken}",
            wire.escape_ascii()
        );
        complete += u64::from(end == End::Complete);
        invalid += u64::from(end == End::Invalid);
        different += u64::from(!same);
    }
    println!("{iterations} bodies: {complete} complete, {invalid} invalid, {different} with a listed difference");
}
