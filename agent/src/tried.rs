//! What came of trying an EPP, an endpoint, a certificate or the Kubernetes API.

/// One attempt and its result, a line of `penstock doctor`.
#[derive(Debug)]
pub struct Trial {
    /// What was tried, such as the pool and the address.
    pub name: String,
    /// Whether it works.
    pub ok: bool,
    /// What it answered, or why it failed.
    pub found: String,
    /// Which setting mends it.
    pub advice: Option<String>,
}

impl Trial {
    pub(crate) fn ok(name: String, found: String) -> Self {
        Self { name, ok: true, found, advice: None }
    }

    pub(crate) fn failed(name: String, found: String, advice: impl Into<String>) -> Self {
        Self { name, ok: false, found, advice: Some(advice.into()) }
    }
}
