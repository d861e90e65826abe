//! The same calls through io_uring. If io_uring is forbidden, both connections log that.

use std::os::fd::AsRawFd as _;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::calls::{PATIENCE, Server, pattern};

const GROUP: u16 = 7;

/// Submits the requests; returns after `results` results.
fn run(ring: &mut IoUring, entries: &[squeue::Entry], results: usize) -> Vec<(i32, bool)> {
    for entry in entries {
        // SAFETY: the buffers that the entries name live until their results have been taken.
        unsafe { ring.submission().push(entry) }.expect("room");
    }
    let (mut seen, limit) = (Vec::new(), types::Timespec::from(PATIENCE));
    let limit = types::SubmitArgs::new().timespec(&limit);
    while seen.len() < results {
        ring.submitter().submit_with_args(1, &limit).expect("a result in time");
        seen.extend(ring.completion().map(|done| (done.result(), cqueue::more(done.flags()))));
    }
    seen
}

/// Receives half with a receive, the rest with a multishot receive into a buffer of the ring.
pub(super) fn receives(server: &mut Server, bytes: usize) {
    let Ok(mut ring) = IoUring::new(8) else { return server.note("no io_uring".to_owned()) };
    let fd = types::Fd(server.socket().as_raw_fd());
    let (mut half, mut shared) = (vec![0u8; bytes / 2], vec![0u8; 2 * 4096]);
    let receive = opcode::Recv::new(fd, half.as_mut_ptr(), half.len() as u32).build();
    let seen = run(&mut ring, &[receive], 1);
    server.note(format!("io_uring receives {seen:?} {half:?}"));
    // Two buffers: without a spare one, Linux 6.1 ends the multishot immediately.
    let provide = opcode::ProvideBuffers::new(shared.as_mut_ptr(), 4096, 2, GROUP, 0).build();
    let seen = run(&mut ring, &[provide], 1);
    server.note(format!("io_uring takes buffers {seen:?}"));
    let multishot = opcode::RecvMulti::new(fd, GROUP).build().user_data(1);
    let seen = run(&mut ring, &[multishot], 1);
    server.note(format!("io_uring receives {seen:?} {:?}", &shared[..bytes - bytes / 2]));
    // Cancelled, because it would receive the next request too.
    let cancel = opcode::AsyncCancel::new(1).build();
    let mut seen = run(&mut ring, &[cancel], 2);
    seen.sort_unstable();
    server.note(format!("io_uring cancels {seen:?}"));
}

pub(super) fn sends(server: &mut Server, bytes: usize) {
    let piece = pattern(server.sent(), bytes);
    let Ok(mut ring) = IoUring::new(8) else {
        server.note("no io_uring".to_owned());
        return server.send(bytes, 0);
    };
    let send = opcode::Send::new(types::Fd(server.socket().as_raw_fd()), piece.as_ptr(), piece.len() as u32).build();
    let seen = run(&mut ring, &[send], 1);
    server.note(format!("io_uring sends {seen:?}"));
    server.add_sent(bytes);
}
