//! What the API server answers to a request.

use std::time::Duration;

use serde_json::{Value, json};

use super::{State, WatchFault, cluster::Selection};

pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) body: Vec<u8>,
}

pub(super) enum Answer {
    Whole(u16, Value),
    Watch(Watch),
    /// A watch that was accepted and is over.
    EndedWatch,
}

/// A watch that was accepted.
pub(super) struct Watch {
    pub(super) selection: Selection,
    pub(super) version: u64,
    /// Ends with an event that says so.
    pub(super) is_gone: bool,
    pub(super) lasts: Duration,
    pub(super) bookmarks: bool,
}

/// The API's description of a failure.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code,
    })
}

fn failure(code: u16, reason: &str, message: &str) -> Answer {
    Answer::Whole(code, status(code, reason, message))
}

/// The collections that there are.
const SERVED: [&str; 8] =
    ["pods", "services", "endpointslices", "inferencepools", "gateways", "httproutes", "referencegrants", "namespaces"];

pub(super) const GONE: &str = "too old resource version";

impl State {
    /// How long the answer to a request takes.
    pub(super) fn delay(&self, request: &Request) -> Duration {
        let faults = self.faults.lock();
        let is_watch = request.target.contains("watch=true");
        let is_of = |plural: &str| request.target.contains(&format!("/{plural}?"));
        match (is_watch, faults.watches, faults.slow_lists) {
            (true, Some(WatchFault::Refused(_, delay)), _) => delay,
            (false, _, Some((plural, delay))) if is_of(plural) => delay,
            _ => Duration::ZERO,
        }
    }

    pub(super) fn answer(&self, request: &Request) -> Answer {
        let faults = self.faults.lock().clone();
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let plural = path.rsplit('/').next().unwrap_or_default();
        if let Some(code) = faults.status {
            return failure(code, "InternalError", "the server fails");
        }
        if faults.missing.iter().any(|part| path.contains(part)) {
            return failure(404, "NotFound", "the server could not find the requested resource");
        }
        if faults.forbidden.iter().any(|end| path.ends_with(&format!("/{end}"))) {
            return failure(403, "Forbidden", &format!("{plural} is forbidden: User \"u\" cannot get it"));
        }
        if request.method == "POST" && plural == "selfsubjectaccessreviews" {
            return review(&request.body, faults.forbidden);
        }
        if request.method != "GET" || !SERVED.contains(&plural) {
            return failure(404, "NotFound", "the server could not find the requested resource");
        }
        let parameters = parameters(query);
        let parameter = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let pairs = |text: &str| {
            let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        let name = parameter("fieldSelector").and_then(|fields| fields.strip_prefix("metadata.name="));
        let selection = Selection {
            path: path.to_owned(),
            labels: parameter("labelSelector").map_or_else(Vec::new, pairs),
            name: name.map(ToOwned::to_owned),
        };
        let number = |name: &str| parameter(name).and_then(|value| value.parse::<u64>().ok());
        if parameter("watch") == Some("true") {
            match faults.watches {
                Some(WatchFault::Refused(code, _)) => return failure(code, "Timeout", "the server refuses to watch"),
                Some(WatchFault::Ended) => return Answer::EndedWatch,
                None => {}
            }
            let version = number("resourceVersion").unwrap_or_default();
            let is_gone = !self.cluster.lock().remembers(version);
            if is_gone && !faults.gone_as_event {
                return failure(410, "Expired", GONE);
            }
            let lasts = Duration::from_secs(number("timeoutSeconds").unwrap_or(1800));
            let bookmarks = parameter("allowWatchBookmarks") == Some("true");
            return Answer::Watch(Watch { selection, version, is_gone, lasts, bookmarks });
        }
        let asked = number("limit").map_or(usize::MAX, |limit| limit as usize);
        self.page(
            &selection,
            asked.min(faults.page.unwrap_or(usize::MAX)),
            number("continue").unwrap_or_default() as usize,
        )
    }

    /// The objects from `first` on.
    fn page(&self, selection: &Selection, limit: usize, first: usize) -> Answer {
        let cluster = self.cluster.lock();
        let all = cluster.list(selection);
        let items: Vec<_> = all.iter().skip(first).take(limit).collect();
        let end = first + items.len();
        let more = if end < all.len() { end.to_string() } else { String::new() };
        let metadata = json!({ "resourceVersion": cluster.version().to_string(), "continue": more });
        Answer::Whole(200, json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
    }
}

/// Answers whether the client may do something.
fn review(body: &[u8], forbidden: &[&str]) -> Answer {
    let mut review: Value = serde_json::from_slice(body).unwrap_or_default();
    let resource = review["spec"]["resourceAttributes"]["resource"].as_str().map(ToOwned::to_owned);
    let is_allowed = resource.is_some_and(|resource| !forbidden.contains(&&*resource));
    review["status"] = json!({ "allowed": is_allowed });
    Answer::Whole(201, review)
}

fn parameters(query: &str) -> Vec<(String, String)> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decoded(key), decoded(value))).collect()
}

/// Decodes percent-encoding, and `+` as a space.
fn decoded(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
