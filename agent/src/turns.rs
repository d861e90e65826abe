//! Schedules work with long CPU-bound steps, such as TLS handshakes: one waiting task takes one step, then everything
//! else that is ready runs. So a running response waits for one step at most, however many clients connect.

use std::{future::poll_fn, pin::pin, task::Poll};

use tokio::{sync::Semaphore, task::yield_now};

pub struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

impl Turns {
    /// Runs `work`; each of its steps waits for its turn, first come first served. Cancel-safe if `work` is.
    pub async fn take<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            let Ok(turn) = self.0.acquire().await else { return work.await };
            // Lets everything that is ready now run first.
            yield_now().await;
            let step = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
            drop(turn);
            if let Poll::Ready(done) = step {
                return done;
            }
            woken().await;
        }
    }
}

/// Resolves when the task is woken next.
async fn woken() {
    let mut is_first = true;
    poll_fn(|_| if std::mem::take(&mut is_first) { Poll::Pending } else { Poll::Ready(()) }).await;
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use tokio::task::{LocalSet, spawn_local};

    use super::*;

    /// A task that is woken as often as the crowd gets one step for each of the crowd's steps.
    #[tokio::test]
    async fn crowd_of_tasks_leaves_others_their_turns() {
        const CROWD: usize = 200;
        const STEPS: usize = 5;
        LocalSet::new()
            .run_until(async {
                let (turns, steps) = (Rc::new(Turns::default()), Rc::new(Cell::new(0_usize)));
                let crowd = (0..CROWD).map(|_| {
                    let (turns, steps) = (Rc::clone(&turns), Rc::clone(&steps));
                    spawn_local(async move {
                        let work = async {
                            for _ in 0..STEPS {
                                steps.set(steps.get() + 1);
                                yield_now().await;
                            }
                        };
                        turns.take(work).await;
                    })
                });
                let crowd: Vec<_> = crowd.collect();
                let (mut before, mut most) = (0, 0);
                while steps.get() < CROWD * STEPS {
                    yield_now().await;
                    most = most.max(steps.get() - before);
                    before = steps.get();
                }
                for one in crowd {
                    one.await.unwrap();
                }
                assert!(most <= 2, "{most} steps in a row");
            })
            .await;
    }
}
