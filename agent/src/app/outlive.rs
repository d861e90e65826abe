//! Flows of path `wire` that outlive an agent: those of agents before this one, and what happens to this one's at its end.

use std::{io, sync::Arc, thread::JoinHandle};

use tokio::sync::watch;

use crate::{
    config::{self, AtStop},
    kernel::wire::is_initial_namespace,
    ladder::{Ladder, Program},
    panics::PanicWatch,
    proxy::Keeper,
    shared::Shared,
};

/// Whether flows outlive an agent that is told to stop.
pub(super) fn leaves(ladder: &Ladder, config: &config::Steering) -> bool {
    let Program::Wire(wire) = &ladder.program else { return false };
    let wanted = match config.at_stop {
        AtStop::Auto => is_initial_namespace(),
        AtStop::Leave => true,
        AtStop::Finish => false,
    };
    wanted && wire.is_pinned()
}

/// Adopts flows of agents that are gone. The ladder's lines say which.
pub(super) fn adopt(ladder: &mut Ladder, leaves: bool) -> Option<Keeper> {
    let (keeper, notes) = Keeper::new(ladder.adoption.take()?, leaves);
    ladder.notes.extend(notes);
    Some(keeper)
}

/// Starts the thread that keeps adopted flows.
pub(super) fn keep(
    keeper: Keeper,
    updates: watch::Receiver<Arc<Shared>>,
    watch: PanicWatch,
) -> io::Result<JoinHandle<()>> {
    const NAME: &str = "penstock-adopt";
    std::thread::Builder::new().name(NAME.into()).spawn(move || {
        watch.run(NAME, || {
            if let Err(error) = keeper.run(&updates) {
                watch.fail(NAME, &format!("cannot keep adopted flows: {error}"));
            }
        });
    })
}
