//! The walk of the kernel programs over one segment (`parse` and `step` in `agent-ebpf/src/`), on a slice.

use penstock_common::framing::Framing;

/// Advances over the segment by at most `max_steps` steps. Returns how many bytes it took.
pub(crate) fn walk(framing: &mut Framing, segment: &[u8], max_steps: u32) -> usize {
    let mut at = framing.skip(segment.len() as u64) as usize;
    for _ in 0..max_steps {
        if at >= segment.len() {
            break;
        }
        let payload = framing.skip((segment.len() - at) as u64) as usize;
        if payload > 0 {
            at += payload;
            continue;
        }
        if !framing.wants_syntax() {
            break;
        }
        framing.step(segment[at]);
        at += 1;
    }
    at
}

/// The kernel program's result: whether the whole segment lies inside the message.
pub(crate) fn parse(framing: &mut Framing, segment: &[u8], max_steps: u32) -> bool {
    walk(framing, segment, max_steps) == segment.len() && !framing.is_invalid()
}
