//! Why a request to the API server failed, in words that name what is missing.

use kube::core::Status;

use super::query::Query;

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(super) struct Failure {
    /// The label in metrics.
    pub(super) reason: &'static str,
    text: String,
    /// Whether the changes after the version that was asked for are not known any more.
    pub(super) is_gone: bool,
}

impl Failure {
    /// `verb` is that of the API: list or watch.
    pub(super) fn new(error: &kube::Error, verb: &str, query: &Query) -> Self {
        match error {
            kube::Error::Api(status) => Self::status(status, verb, query),
            kube::Error::SerdeError(error) => {
                Self::other("malformed", format!("cannot read the reply to {verb} {}: {error}", query.resource))
            }
            error => {
                // The outer error says only in which part of the client it occurred.
                let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), chain);
                Self::other("unreachable", format!("cannot {verb} {}: {cause}", query.resource))
            }
        }
    }

    pub(super) fn status(status: &Status, verb: &str, query: &Query) -> Self {
        let (resource, namespace) = (query.resource, &query.namespace);
        // What the server says about it, if anything.
        let said = if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
        let (reason, text) = match status.code {
            401 => ("unauthorized", format!("the API server does not accept the agent's credentials{said}")),
            403 => {
                let place =
                    if namespace.is_empty() { "all namespaces".to_owned() } else { format!("namespace {namespace}") };
                let found = format!("not permitted to {verb} {resource} in {place}");
                ("forbidden", format!("{found}, expected get, list and watch{said}"))
            }
            404 => {
                let found = format!("the API server has no {resource} of version {}", resource.version);
                ("not_found", format!("{found}, expected the CRD to be installed{said}"))
            }
            410 => ("gone", format!("cannot {verb} {resource}: the version is too old")),
            // What the client makes of an event that it cannot read.
            0 => ("malformed", format!("cannot read the reply to {verb} {resource}{said}")),
            code => ("refused", format!("cannot {verb} {resource}: the API server answered {code}{said}")),
        };
        Self { reason, text, is_gone: status.code == 410 }
    }

    pub(super) fn forbidden(verb: &str, query: &Query) -> Self {
        Self::status(&Status { code: 403, ..Status::success() }, verb, query)
    }

    pub(super) fn timed_out(verb: &str, query: &Query) -> Self {
        Self::other("timeout", format!("cannot {verb} {}: no answer in time", query.resource))
    }

    pub(super) fn other(reason: &'static str, text: String) -> Self {
        Self { reason, text, is_gone: false }
    }
}

/// The error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::query::PODS, *};

    #[test]
    fn missing_permission_names_verb_resource_and_namespace() {
        let (query, status) = (Query::labelled(PODS, "models", []), |code| Status { code, ..Status::success() });
        let failure = |code, verb| Failure::status(&status(code), verb, &query);
        let text = failure(403, "watch").to_string();
        assert!(text.contains("not permitted to watch pods in namespace models"), "{text}");
        let reasons = [401, 403, 404, 410, 0, 500].map(|code| failure(code, "list").reason);
        assert_eq!(reasons, ["unauthorized", "forbidden", "not_found", "gone", "malformed", "refused"]);
        assert!(failure(410, "list").is_gone && !failure(500, "list").is_gone);
    }
}
