//! The control thread: runs the background tasks, once for all workers, on its own runtime. So these tasks take no time
//! from a worker; their few blocking file reads run on the runtime's blocking threads.

use std::{convert::Infallible, io, thread::JoinHandle};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;

use crate::panics::PanicWatch;

const THREAD: &str = "penstock-control";

/// A task that runs until the agent ends.
pub type Task = BoxFuture<'static, ()>;

/// The running control thread. Dropping it cancels its tasks and joins the thread.
pub struct Control(Option<ControlThread>);

struct ControlThread {
    /// The thread stops when this sender is dropped.
    stop: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Starts the thread, unless there are no tasks.
    pub fn start(tasks: Vec<Task>, watch: &PanicWatch) -> io::Result<Self> {
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
            // Does not wait for a blocking file read that hangs.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work))?;
        Ok(Self(Some(ControlThread { stop, thread })))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(ControlThread { stop, thread }) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}
