//! The control thread: what goes on beside requests, once for all workers. It has a runtime of its own, so that nothing here
//! takes time from a worker, and the few blocking reads of files are done on that runtime's other threads.

use std::{convert::Infallible, io, thread::JoinHandle};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;

/// Runs until the agent ends.
pub type Task = BoxFuture<'static, ()>;

/// Dropping it ends its tasks, and waits for the thread.
pub struct Control {
    /// Closed by being dropped.
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub fn start(tasks: Vec<Task>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("penstock-control".to_owned()).spawn(move || {
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
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so already.
            let _ = thread.join();
        }
    }
}
