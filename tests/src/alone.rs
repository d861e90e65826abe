//! Tests that measure the machine run one after the other.

use tokio::sync::{Mutex, MutexGuard};

/// Waits until no other test of this binary measures, and keeps the others waiting until the guard is dropped.
pub async fn alone() -> MutexGuard<'static, ()> {
    static MEASURING: Mutex<()> = Mutex::const_new(());
    MEASURING.lock().await
}
