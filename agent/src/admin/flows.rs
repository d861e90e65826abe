//! `/flows`: the flows of path `wire` that have begun. GET lists them, DELETE ends all of them or that of one client's connection.

use std::net::SocketAddr;

use http::{Method, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Bytes;
use serde_json::json;

use super::answer::{document, not_allowed, text};
use crate::kernel::wire::{FlowStop, ListedFlow, Registry};

const PATH: &str = "/flows";

/// The flows that a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AskedFlow {
    All,
    Of(SocketAddr),
    /// Not an address with a port.
    Unreadable,
}

/// What a path names; `None` if it is another resource's.
pub(super) fn asked(path: &str) -> Option<AskedFlow> {
    match path.strip_prefix(PATH)? {
        "" => Some(AskedFlow::All),
        rest => {
            // Brackets around an IPv6 address may be escaped (RFC 3986 §3.3).
            let address = rest.strip_prefix('/')?.replace("%5B", "[").replace("%5D", "]");
            Some(address.parse().map_or(AskedFlow::Unreadable, AskedFlow::Of))
        }
    }
}

pub(super) fn answer(flows: Option<&Registry>, method: &Method, asked: AskedFlow) -> Response<Full<Bytes>> {
    let client = match asked {
        AskedFlow::All if matches!(*method, Method::GET | Method::HEAD) => return list(flows),
        AskedFlow::All if *method != Method::DELETE => return not_allowed("GET, HEAD, DELETE"),
        _ if *method != Method::DELETE => return not_allowed("DELETE"),
        AskedFlow::All => None,
        AskedFlow::Of(client) => Some(client),
        AskedFlow::Unreadable => {
            return text(StatusCode::BAD_REQUEST, "expected /flows/ADDRESS:PORT of a client\n".to_owned());
        }
    };
    let ended = flows.map_or(0, |flows| flows.end(client, FlowStop::Deleted));
    if ended > 0 {
        tracing::info!(
            ended,
            client = client.map(tracing::field::display),
            "flows of path wire ended by the admin port"
        );
    }
    let status = if client.is_some() && ended == 0 { StatusCode::NOT_FOUND } else { StatusCode::OK };
    document(status, &json!({ "ended": ended }))
}

fn list(flows: Option<&Registry>) -> Response<Full<Bytes>> {
    let list = flows.map(Registry::list).unwrap_or_default().into_iter().map(|flow| {
        let ListedFlow { client, endpoint, bytes, quiet, is_adopted } = flow;
        json!({ "client": client, "endpoint": endpoint, "bytes": bytes, "quiet_ms": quiet.as_millis() as u64, "adopted": is_adopted })
    });
    document(StatusCode::OK, &list.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_all_flows_or_those_of_an_address() {
        let of = |address: &str| Some(AskedFlow::Of(address.parse().unwrap()));
        for (path, expected) in [
            ("/flows", Some(AskedFlow::All)),
            ("/flows/192.0.2.1:4000", of("192.0.2.1:4000")),
            ("/flows/[2001:db8::1]:4000", of("[2001:db8::1]:4000")),
            ("/flows/%5B2001:db8::1%5D:4000", of("[2001:db8::1]:4000")),
            ("/flows/192.0.2.1", Some(AskedFlow::Unreadable)),
            ("/flows/", Some(AskedFlow::Unreadable)),
            ("/flowsandmore", None),
            ("/", None),
        ] {
            assert_eq!(asked(path), expected, "{path}");
        }
    }
}
