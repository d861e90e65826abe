//! The kernel program's walk over a head (`head` and `head_step` in `agent-ebpf/src/verdict.rs`), over a slice.

use penstock_common::{
    framing::Framing,
    head::{Head, MAX_HEAD},
};

/// The program's answer to a head, and what comes behind it.
pub(crate) fn head(framing: &mut Framing, segment: &[u8]) -> u32 {
    let (mut head, mut at) = (Head::new(), 0);
    while at < segment.len().min(MAX_HEAD as usize) && !head.is_over() {
        head.step(segment[at]);
        at += 1;
    }
    match head.framing() {
        Some(behind) => {
            *framing = behind;
            head.passed(at as u32)
        }
        None => 0,
    }
}
