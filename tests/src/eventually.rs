//! Waiting for a condition, which is what tests do in place of sleeping.

use std::panic::Location;
use std::time::{Duration, Instant};

/// Returns as soon as `condition` holds; it is looked at every millisecond. Panics, naming the caller, when it does not
/// hold within `deadline`. Cancel-safe.
#[track_caller]
pub fn eventually(deadline: Duration, condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        assert!(within(deadline, condition).await, "{caller}: the condition did not hold within {deadline:?}");
    }
}

/// As [`eventually`]; false when it does not hold in time.
pub(crate) async fn within(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() >= deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    true
}
