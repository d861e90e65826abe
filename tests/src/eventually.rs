//! Waits for conditions, in place of sleeps.

use std::panic::Location;
use std::time::{Duration, Instant};

/// Returns as soon as `condition` holds; checks it every millisecond. Panics with the caller's location if it does not hold within
/// `deadline`. Cancel-safe.
#[track_caller]
pub fn eventually(deadline: Duration, condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        assert!(within(deadline, condition).await, "{caller}: the condition did not hold within {deadline:?}");
    }
}

/// Like [`eventually`]; returns false if the condition does not hold in time.
pub async fn within(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    true
}
