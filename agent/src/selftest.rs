//! The self-test: proves on loopback connections, before the first request, that this kernel steers without losing a
//! byte.
//!
//! Each case sends patterned bytes through the code that serves clients and compares all of them. Rare races cannot be
//! excluded this way; kernels that are known for them are refused by version.

mod cases;
mod rig;
mod visible;
mod wire;

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::future::LocalBoxFuture;
use penstock_common::path::Path;

use crate::{kernel::Kernel, steer::WorkerSteering};

/// Time limit for the cases of one path. They take some tens of milliseconds, but a node that starts many processes at once is
/// slow, and a path that is off stays off.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How long a loopback connection may take.
const LOOPBACK: Duration = Duration::from_secs(2);

/// The cases that every path must pass.
pub const CASES: &[Case] = cases::CASES;

pub use visible::how_visible;
#[cfg(test)]
pub(crate) use wire::WIRE_FAILING;
pub use wire::{WIRE_CASES, WireCase, prove_wire};

/// One requirement of a path.
pub struct Case {
    pub name: &'static str,
    run: fn(&Rc<WorkerSteering>, Path) -> LocalBoxFuture<'_, Result<()>>,
}

/// The result of a case.
#[derive(Debug, Clone)]
pub struct Check {
    /// Name of the case, as `penstock doctor` prints it.
    pub case: &'static str,
    /// How long it ran.
    pub took: Duration,
    /// Why the case failed, if it did.
    pub failure: Option<String>,
}

/// Checks that a byte passes a loopback connection. Everything else here would wait for one, and the start with it.
pub fn check_loopback() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect_timeout(&listener.local_addr()?, LOOPBACK)?;
    // The kernel has completed the handshake.
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(LOOPBACK))?;
    client.write_all(&[7])?;
    Ok(server.read_exact(&mut [0])?)
}

/// Runs the cases on one path until the deadline, on a runtime of its own. Fails if the cases cannot run at all.
pub fn prove(kernel: &Arc<Kernel>, path: Path, cases: &[Case], deadline: Instant) -> Result<Vec<Check>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let steering = WorkerSteering::new(kernel)?;
    Ok(runtime.block_on(async {
        let deadline = tokio::time::Instant::from_std(deadline);
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
                Err(_) => Some(format!("no result within {LIMIT:?} of the path's first case")),
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
                let checks = prove(&kernel, path, CASES, Instant::now() + LIMIT).expect("the cases run");
                assert_eq!(checks.len(), CASES.len());
                assert!(checks.iter().all(|check| check.failure.is_none()), "{path:?}: {checks:#?}");
            }
        }
        assert_eq!(kernel.events().take_missed(), 0);
    }

    #[test]
    fn cases_end_at_the_deadline() {
        let kernel = Arc::new(Kernel::load(64).expect("load"));
        let hanging = [Case { name: "hangs", run: |_, _| Box::pin(std::future::pending()) }];
        let begun = Instant::now();
        let checks =
            prove(&kernel, Path::Ingress, &hanging, begun + Duration::from_millis(200)).expect("the cases run");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let failure = checks[0].failure.as_deref().expect("a failure");
        assert!(failure.starts_with("no result within 20s"), "{failure}");
    }

    #[test]
    fn failed_case_has_a_reason_and_the_others_still_run() {
        let kernel = Arc::new(Kernel::load(64).expect("load"));
        let checks = prove(&kernel, Path::Ingress, FAILING, Instant::now() + LIMIT).expect("the cases run");
        let failures: Vec<_> = checks.iter().map(|check| (check.case, check.failure.as_deref())).collect();
        assert_eq!(failures, [("bad", Some("a hole at 7")), ("good", None)]);
    }
}
