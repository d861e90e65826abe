//! Tests that measure the machine run one after the other, also those of test programs that run at the same time.

use std::{env, fs::File, path::Path};

/// Other tests that measure wait until it is dropped.
pub struct Alone(#[expect(dead_code, reason = "closing it ends the lock")] File);

/// Waits until no other test measures.
pub async fn alone() -> Alone {
    let program = env::current_exe().expect("the path of this test program");
    lock(program.parent().expect("a program is in a folder")).await
}

/// Locks the folder, which all test programs of one build share.
async fn lock(folder: &Path) -> Alone {
    let folder = File::open(folder).expect("the folder of the test programs");
    // On a thread of its own, because tests may wait for minutes, and those that measure may keep the runtime's threads busy.
    let folder = tokio::task::spawn_blocking(move || folder.lock().map(|()| folder)).await;
    Alone(folder.expect("no panic").expect("a lock of the folder"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::eventually;

    #[tokio::test]
    async fn second_test_waits_for_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).await;
        let (other, path) = (File::open(folder.path()).unwrap(), folder.path().to_owned());
        assert!(other.try_lock().is_err(), "another program takes the lock");
        let mut second = tokio::spawn(async move { lock(&path).await });
        assert!(timeout(Duration::from_millis(100), &mut second).await.is_err(), "the second test does not wait");
        drop(first);
        timeout(Duration::from_secs(10), second).await.unwrap().unwrap();
        // A program that another test starts has the lock, too, until it runs.
        eventually(Duration::from_secs(10), || other.try_lock().is_ok()).await;
    }
}
