//! Tasks that stay on their worker: what hyper runs beside a connection does not cross threads.

#[derive(Debug, Clone, Copy)]
pub struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}
