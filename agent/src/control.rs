//! The control thread: what goes on beside requests, once for all workers. It has a runtime of its own, so that nothing here
//! takes time from a worker, and the few blocking reads of files are done on that runtime's other threads.

use std::{convert::Infallible, io, thread::JoinHandle};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;

use crate::panics::Watch;

const THREAD: &str = "penstock-control";

/// Runs until the agent ends.
pub type Task = BoxFuture<'static, ()>;

/// Dropping it ends its tasks, and waits for the thread.
pub struct Control(Option<Running>);

struct Running {
    /// Closed by being dropped.
    stop: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Without tasks there is no thread.
    pub fn start(tasks: Vec<Task>, watch: &Watch) -> io::Result<Self> {
        if tasks.is_empty() {
            return Ok(Self(None));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let watch = watch.clone();
        let work = move || {
            runtime.block_on(async {
                let all = async {
                    join_all(tasks).await;
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = all => {}
                    _ = stopped => {}
                }
            });
            // A read of a file that hangs holds nobody up.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work))?;
        Ok(Self(Some(Running { stop, thread })))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(Running { stop, thread }) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}
