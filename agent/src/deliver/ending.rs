//! How a response on path `wire` ended, and the last of its payload, from what the kernel programs have seen: the bytes have not passed
//! user space.

use penstock_common::{
    framing::{Framing, state},
    wire::flow::mark,
};

use super::End;
use crate::kernel::wire::{LastBytes, Seen};

/// What the end of a flow means for the response, given state and rest of the body's framing when the flow began, and the last of the
/// payload if the body is whole.
pub fn judge(seen: &Seen, framing: u32, left: u64, last: &LastBytes) -> (End, Option<Vec<u8>>) {
    let client_closed = seen.marks & (mark::CLIENT_CLOSED_FIRST | mark::CLIENT_RESET) != 0;
    let endpoint_closed = seen.finished && seen.marks & mark::CLIENT_CLOSED_FIRST == 0;
    let as_it_is = |is_whole: bool| is_whole.then(|| last.bytes.clone());
    let payload = match framing {
        state::LENGTH => as_it_is(seen.told_all && seen.bytes == left),
        state::UNTIL_CLOSE => as_it_is(endpoint_closed),
        _ if !seen.told_all => None,
        _ if last.are_all => chunks(Framing { state: framing, left, ..Framing::chunked() }, &last.bytes),
        _ => last_chunks(&last.bytes),
    };
    let end = match () {
        () if payload.is_some() => End::Complete { reusable: false },
        () if client_closed => End::ClientGone,
        () => End::Broken,
    };
    (end, payload)
}

/// The payload of chunks, if the message ends with the last byte.
fn chunks(mut framing: Framing, mut wire: &[u8]) -> Option<Vec<u8>> {
    let mut found = Vec::with_capacity(wire.len());
    while !wire.is_empty() && !framing.is_done() && !framing.is_invalid() {
        let (taken, payload) = framing.next(wire);
        found.extend_from_slice(payload.unwrap_or_default());
        wire = &wire[taken..];
    }
    (framing.is_done() && wire.is_empty()).then_some(found)
}

/// The payload at the end of a chunked body of which only these last bytes are known, if they are its end: from the first chunk from
/// which they parse exactly to the end of the message. Bytes before it belong to a chunk that began earlier.
fn last_chunks(wire: &[u8]) -> Option<Vec<u8>> {
    const CRLF: &[u8] = b"\r\n";
    let ends = wire.windows(CRLF.len()).enumerate().filter(|(_, bytes)| *bytes == CRLF).map(|(at, _)| at);
    ends.into_iter().find_map(|end| {
        let rest = chunks(Framing::chunked(), &wire[end + CRLF.len()..])?;
        Some([&wire[..end], &rest].concat())
    })
}

#[cfg(test)]
mod tests {
    use penstock_common::{tail::TAIL, wire::flow::state as flow};

    use super::*;

    /// A flow that the endpoint has closed orderly, of which the client has everything.
    fn seen(bytes: u64) -> Seen {
        Seen { state: flow::ENDED, finished: true, told_all: true, bytes, ..Seen::default() }
    }

    /// What is kept of these bytes.
    fn last(wire: &[u8]) -> LastBytes {
        let kept = wire.len().min(TAIL as usize);
        LastBytes { bytes: wire[wire.len() - kept..].to_vec(), are_all: kept == wire.len() }
    }

    fn chunked(payload: &[u8], size: usize, end: &str) -> Vec<u8> {
        let mut wire = Vec::new();
        for chunk in payload.chunks(size) {
            wire.extend_from_slice(format!("{:x};name=value\r\n", chunk.len()).as_bytes());
            wire.extend_from_slice(chunk);
            wire.extend_from_slice(b"\r\n");
        }
        wire.extend_from_slice(end.as_bytes());
        wire
    }

    /// Judges a chunked body of which user space had the first `relayed` bytes.
    fn judged(wire: &[u8], relayed: usize) -> (End, Option<Vec<u8>>) {
        let mut framing = Framing::chunked();
        framing.feed(&wire[..relayed]);
        let carried = &wire[relayed..];
        judge(&seen(carried.len() as u64), framing.state, framing.left, &last(carried))
    }

    const WHOLE: End = End::Complete { reusable: false };
    const ENDS: [&str; 4] =
        ["0\r\n\r\n", "0\r\nx-sum: 1\r\n\r\n", "000;a=b\r\n\r\n", "0\r\na: 1\r\nb: 2\r\nc: \r\n\r\n"];

    #[test]
    fn chunked_bodies_are_whole_with_every_end_and_from_every_byte() {
        let payload: Vec<u8> = b"data: {\"n\":1}\n\n".repeat(10);
        for end in ENDS {
            for size in [1, 7, 1000] {
                let wire = chunked(&payload, size, end);
                for relayed in 0..wire.len() {
                    let (ended, rest) = judged(&wire, relayed);
                    assert_eq!(ended, WHOLE, "{end:?} {size} {relayed}");
                    assert!(payload.ends_with(&rest.unwrap()), "{end:?} {size} {relayed}");
                }
                for cut in 0..wire.len() - 1 {
                    assert_eq!(judged(&wire[..=cut], 0), (End::Broken, None), "{end:?} {size} cut after {cut}");
                }
            }
        }
    }

    /// Payload with lines that end with CRLF, as those between chunks do.
    #[test]
    fn payload_at_the_end_of_long_bodies_is_found() {
        for line in ["data: 1\n\n", "data: 1\r\n\r\n", "\r\n", "0\r\n", "a: b\r\n"] {
            let payload = line.as_bytes().repeat(20_000 / line.len());
            for (end, size) in ENDS.into_iter().flat_map(|end| [(end, 300), (end, 3000), (end, 10_000)]) {
                // The kept part begins at each byte of a chunk and its size.
                for more in 0..40 {
                    let payload = &payload[more..];
                    let (ended, rest) = judged(&chunked(payload, size, end), 0);
                    assert_eq!(ended, WHOLE, "{line:?} {end:?} {size} {more}");
                    let rest = rest.unwrap();
                    // Less than a line of what was kept is syntax.
                    let known = rest.len().min(TAIL as usize - 20 * (TAIL as usize / size + 2) - 60);
                    assert!(payload.ends_with(&rest[rest.len() - known..]), "{line:?} {end:?} {size} {more}");
                }
            }
        }
    }

    #[test]
    fn long_bodies_that_break_off_are_cut() {
        let wire = chunked(&b"data: 1\r\n\r\n".repeat(2000), 300, ENDS[1]);
        for missing in 1..2000 {
            assert_eq!(judged(&wire[..wire.len() - missing], 0).0, End::Broken, "without {missing}");
        }
    }

    #[test]
    fn bodies_of_other_framings_end_by_count_or_by_close() {
        let bytes = last(b"data: 1\n\n");
        let rows = [
            (seen(9), state::LENGTH, 9, WHOLE),
            (seen(8), state::LENGTH, 9, End::Broken),
            (Seen { told_all: false, ..seen(9) }, state::LENGTH, 9, End::Broken),
            (seen(9), state::UNTIL_CLOSE, 0, WHOLE),
            (Seen { finished: false, ..seen(9) }, state::UNTIL_CLOSE, 0, End::Broken),
            (Seen { marks: mark::CLIENT_CLOSED_FIRST, ..seen(9) }, state::UNTIL_CLOSE, 0, End::ClientGone),
            (Seen { marks: mark::CLIENT_RESET, told_all: false, ..seen(9) }, state::LENGTH, 9, End::ClientGone),
        ];
        for (seen, framing, left, expected) in rows {
            let (end, payload) = judge(&seen, framing, left, &bytes);
            assert_eq!(end, expected, "{seen:?} {framing} {left}");
            assert_eq!(payload, (end == WHOLE).then(|| bytes.bytes.clone()));
        }
        let ended = chunked(b"data: 1\n\n", 100, ENDS[0]);
        let unread = Seen { told_all: false, ..seen(ended.len() as u64) };
        assert_eq!(judge(&unread, state::SIZE_FIRST, 0, &last(&ended)).0, End::Broken);
    }
}
