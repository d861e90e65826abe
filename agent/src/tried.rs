//! What came of trying an EPP, an endpoint, a certificate or the Kubernetes API.

#[derive(Debug)]
pub struct Trial {
    pub name: String,
    pub ok: bool,
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
