//! Work whose steps keep a worker busy for long, such as TLS handshakes, in turns: of all that wait one takes a step, and then
//! whatever else is ready runs. However many clients come at once, a response that flows waits for one step.

use std::{future::poll_fn, pin::pin, task::Poll};

use tokio::{sync::Semaphore, task::yield_now};

pub struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(1))
    }
}

impl Turns {
    /// Does `work`, whose every step waits for its turn, first come first served. Cancel-safe if `work` is.
    pub async fn take<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            let Ok(turn) = self.0.acquire().await else { return work.await };
            // Behind everything that is ready now.
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

    /// A stream that is woken as often as they are gets a step for each of theirs, however many they are.
    #[tokio::test]
    async fn turns_of_a_crowd_leave_others_as_many() {
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
