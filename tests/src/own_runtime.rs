//! Runs a test's server on its own thread and current-thread runtime, so that it shares no scheduler with the agent under test.
//! Dropping the handle drops the runtime and every socket of the server.

use std::thread::JoinHandle;

use anyhow::{Context, Result};
use tokio::sync::oneshot;

pub(crate) struct OwnRuntime {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl OwnRuntime {
    /// Runs `begin` on the new runtime and returns its result with the handle; the tasks it spawned continue.
    pub(crate) async fn start<T, F>(name: &str, begin: impl FnOnce() -> F + Send + 'static) -> Result<(T, Self)>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let (ready, began) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let outcome = begin().await;
                let failed = outcome.is_err();
                if ready.send(outcome).is_ok() && !failed {
                    let _ = stopped.await;
                }
            });
        })?;
        let value = began.await.context("the server's thread ended while starting")??;
        Ok((value, Self { stop: Some(stop), thread: Some(thread) }))
    }

    /// Ends the runtime at once; returns after its sockets are closed.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        self.stop();
    }
}
