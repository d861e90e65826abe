//! CPU time of threads of this process, by their name.

use std::time::Duration;

use anyhow::Result;

/// CPU time of the threads whose name begins like this, without the main thread, which is named after the process
/// (`/proc/self/task/ID/schedstat`).
pub fn thread_cpu(prefix: &str) -> Result<Duration> {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        let is_main = task.ends_with(std::process::id().to_string());
        if !is_main && std::fs::read_to_string(task.join("comm"))?.starts_with(prefix) {
            let text = std::fs::read_to_string(task.join("schedstat"))?;
            nanos += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(Duration::from_nanos(nanos))
}
