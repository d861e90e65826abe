//! What is logged, which the admin port can change while the agent runs. A process has a single log, so the filter is global.

use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing_subscriber::{EnvFilter, filter::ParseError, reload};

/// Longest filter in bytes.
const LONGEST: usize = 1024;

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>;

struct LogFilter {
    /// As it was given.
    text: Mutex<String>,
    change: SetFilter,
}

static FILTER: OnceLock<LogFilter> = OnceLock::new();

/// Why the filter stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum LogFilterError {
    /// The request names none.
    #[error("found no filter, expected /log?filter=LEVEL or /log?filter=TARGET=LEVEL,...")]
    Absent,
    /// It has so many bytes.
    #[error("found a filter of {0} bytes, expected at most {LONGEST}")]
    TooLong(usize),
    /// Its text, and why it cannot be read.
    #[error(
        "found {0:?}: {1}; expected LEVEL or TARGET=LEVEL,... with the levels off, error, warn, info, debug and trace"
    )]
    Invalid(String, ParseError),
    /// The log was started by something else, or not at all.
    #[error("this process has no log whose filter can change")]
    Fixed,
}

/// The filter that `text` describes.
pub fn parse(text: &str) -> Result<EnvFilter, ParseError> {
    // What the client of the Kubernetes API says about a failure, the discovery says with the pool's name.
    let whole = if text.contains("kube_client") { text.to_owned() } else { format!("{text},kube_client=off") };
    EnvFilter::builder().parse(whole)
}

/// Has `change` set later filters. `text` describes the one in use.
pub fn installed(text: &str, change: impl Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync + 'static) {
    // A second log of one process does not exist.
    let _ = FILTER.set(LogFilter { text: Mutex::new(text.to_owned()), change: Box::new(change) });
}

/// The filter in use, as it was given. `None` outside of `penstock run`.
pub fn current() -> Option<String> {
    FILTER.get().map(|filter| filter.text.lock().clone())
}

/// Logs what `text` describes from now on.
pub fn set(text: &str) -> Result<(), LogFilterError> {
    if text.trim().is_empty() {
        return Err(LogFilterError::Absent);
    }
    if text.len() > LONGEST {
        return Err(LogFilterError::TooLong(text.len()));
    }
    let parsed = parse(text).map_err(|error| LogFilterError::Invalid(text.to_owned(), error))?;
    let filter = FILTER.get().ok_or(LogFilterError::Fixed)?;
    let mut current = filter.text.lock();
    (filter.change)(parsed).map_err(|_| LogFilterError::Fixed)?;
    text.clone_into(&mut current);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_changed_only_by_valid_ones() {
        assert!(matches!(set("info"), Err(LogFilterError::Fixed)));
        let (_, handle) = reload::Layer::<EnvFilter, tracing_subscriber::Registry>::new(parse("info").unwrap());
        let changed = handle.clone();
        installed("info", move |filter| changed.reload(filter));
        for (text, expected) in [
            ("", "found no filter"),
            (&"x".repeat(LONGEST + 1), "found a filter of 1025 bytes"),
            ("info,penstock=loud", "found \"info,penstock=loud\": "),
        ] {
            let error = set(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        assert_eq!(current().as_deref(), Some("info"));
        // The layer that the handle changes is gone.
        assert!(matches!(set("debug"), Err(LogFilterError::Fixed)));
    }
}
