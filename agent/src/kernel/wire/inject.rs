//! Lets this machine's TCP reset the peers of a flow: it sees an acknowledgement for which it has no socket, and answers with a reset
//! that has the acknowledged number.

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use penstock_common::wire::{
    flow::{CLIENT, ENDPOINT, Ends},
    inject::{MAX_LEN, acknowledgement},
};

use super::{INJECT_PROGRAM, Wire, interface, table::Table};
use crate::kernel::LoadError;

/// Makes the programs forget a flow, and resets both of its peers. The agent's own sockets must be closed.
pub(super) fn reset(wire: &Wire, table: &Table, index: u32) {
    let (ends, flow) = (table.ends(index), table.words(index));
    let sent = |leg: usize| flow.legs[leg].sent();
    let shift = |leg: usize| flow.legs[leg].shift();
    table.forget(index, ends);
    for (leg, other) in [(CLIENT, ENDPOINT), (ENDPOINT, CLIENT)] {
        let interface = flow.legs[leg].arrives_on.get() as u32;
        let ack = sent(other).wrapping_add(shift(other).seq);
        if let Err(error) = inject(wire, interface, &ends[leg], sent(leg), ack) {
            tracing::debug!(%error, leg, "could not reset a peer of a flow");
        }
    }
}

/// `seq` and `ack` are numbers as the peer would write them. Needs no capability beyond the program's descriptor.
fn inject(wire: &Wire, interface: u32, ends: &Ends, seq: u32, ack: u32) -> Result<(), LoadError> {
    let hardware = interface::hardware_address(interface)?;
    let mut frame = [0; MAX_LEN];
    let len = acknowledgement(&mut frame, hardware, interface, ends, seq, ack);
    let program: &SchedClassifier =
        wire.ebpf.program(INJECT_PROGRAM).ok_or(LoadError::Missing(INJECT_PROGRAM))?.try_into()?;
    let options = TestRunOptions { data_in: Some(&frame[..len]), ..TestRunOptions::default() };
    match program.test_run(options)?.return_value {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error((error as i32).wrapping_neg()).into()),
    }
}
