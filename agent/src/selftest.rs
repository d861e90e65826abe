//! The self-test: proves on loopback connections, before the first request, that this kernel steers without losing a
//! byte.
//!
//! Each case sends patterned bytes through the code that serves clients and compares all of them. Rare races cannot be
//! excluded this way; kernels that are known for them are refused by version.

mod cases;
mod rig;
mod visible;

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::future::LocalBoxFuture;
use penstock_common::path::Path;

use crate::{kernel::Kernel, steer::WorkerSteering};

/// Time limit for all cases of a path. They take some tens of milliseconds, but a node that starts many processes at
/// once is slow, and a path that is off stays off.
const DEADLINE: Duration = Duration::from_secs(20);

/// The cases that every path must pass.
pub const CASES: &[Case] = cases::CASES;

pub use visible::how_visible;

/// One requirement of a path.
pub struct Case {
    pub name: &'static str,
    run: fn(&Rc<WorkerSteering>, Path) -> LocalBoxFuture<'_, Result<()>>,
}

/// The result of a case.
#[derive(Debug, Clone)]
pub struct Check {
    pub case: &'static str,
    pub took: Duration,
    /// Why the case failed, if it did.
    pub failure: Option<String>,
}

/// Runs the cases on one path, on a runtime of its own. Fails if the cases cannot run at all.
pub fn prove(kernel: &Arc<Kernel>, path: Path, cases: &[Case]) -> Result<Vec<Check>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let steering = WorkerSteering::new(kernel)?;
    Ok(runtime.block_on(async {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let mut checks = Vec::with_capacity(cases.len());
        for case in cases {
            // Each case takes a slot. A small table may be full of retired slots, which is not a fault of the path.
            if kernel.slots().is_exhausted() {
                kernel.slots().reclaim();
            }
            let begin = Instant::now();
            let outcome = tokio::time::timeout_at(deadline, (case.run)(&steering, path)).await;
            let failure = match outcome {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(_) => Some(format!("no result within {DEADLINE:?}")),
            };
            checks.push(Check { case: case.name, took: begin.elapsed(), failure });
        }
        checks
    }))
}

#[cfg(test)]
pub(crate) const FAILING: &[Case] = &[
    Case { name: "bad", run: |_, _| Box::pin(async { anyhow::bail!("a hole at {}", 7) }) },
    Case { name: "good", run: |_, _| Box::pin(async { Ok(()) }) },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_kernel_passes_every_case() {
        // A case uses one connection at a time.
        let mut kernel = Kernel::load(1).expect("load");
        kernel.try_local(None);
        assert_eq!(kernel.local(), Ok(()));
        let kernel = Arc::new(kernel);
        for _ in 0..10 {
            for path in [Path::Local, Path::Ingress] {
                let checks = prove(&kernel, path, CASES).expect("the cases run");
                assert_eq!(checks.len(), CASES.len());
                assert!(checks.iter().all(|check| check.failure.is_none()), "{path:?}: {checks:#?}");
            }
        }
        assert_eq!(kernel.events().take_missed(), 0);
    }

    #[test]
    fn failed_case_has_a_reason_and_the_others_still_run() {
        let kernel = Arc::new(Kernel::load(64).expect("load"));
        let checks = prove(&kernel, Path::Ingress, FAILING).expect("the cases run");
        let failures: Vec<_> = checks.iter().map(|check| (check.case, check.failure.as_deref())).collect();
        assert_eq!(failures, [("bad", Some("a hole at 7")), ("good", None)]);
    }
}
