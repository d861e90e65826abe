//! Answers `GET /v1/models` for all pools at once (`models.list = "merged"`).
//!
//! Asks one endpoint of each pool, with the client's fields, and a second one if the first does not answer. Everything is bounded: the
//! time, the bytes and the models of each list, and the endpoints that a worker asks at once.

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header, uri::PathAndQuery};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::request::{AfterRequest, LIST_PATH, Request};
use crate::{
    client::Client,
    config::{Config, ModelPattern},
    endpoint::single::{SingleError, SingleRequest},
    error::Error,
    http::{headers, reply::Reply, response::ResponseError},
    picker::builtin::NoEndpoint,
    upload::Upload,
    worker::Worker,
};

/// The most bytes of one pool's list.
const LIST: usize = 1 << 20;
/// The most models of the merged list.
const MODELS: usize = 10_000;
/// The most endpoints of one pool that are asked.
const ATTEMPTS: usize = 2;

/// What a pool has answered.
enum PoolAnswer {
    Models(Vec<Value>),
    /// Not with a list.
    Refused(Response<Bytes>),
    /// With a success that has no list, or with a status that the request cannot cause, such as 304.
    NoList(SocketAddr, StatusCode),
}

/// Answers with the models of all pools. If no pool has a list, the answer is that of the first pool that refused one.
pub(super) async fn answer_models(
    worker: &Worker,
    client: &mut Client,
    request: &mut Request,
    upload: &Upload,
) -> Result<AfterRequest, Error> {
    let config = &worker.shared.config;
    let fields = fields(worker, &request.parts.headers);
    let until = Instant::now() + config.models.timeout;
    let (pools, fields) = (0..config.pools.len(), &fields);
    let asked = join_all(pools.map(|pool| async move {
        let listed = timeout_at(until, list(worker, pool, fields)).await.ok().flatten();
        if listed.is_none() {
            tracing::debug!(pool = config.pools[pool].name, "pool left out of the list of models");
        }
        listed
    }));
    let listed = tokio::select! {
        biased;
        listed = request.deadline.limit::<_, Error>(async { Ok(asked.await) }) => listed?,
        () = client.gone() => return Err(Error::ClientGone),
    };
    let (mut models, mut is_any) = (MergedModels::default(), false);
    let (mut refused, mut error) = (None, Error::NoEndpoint(NoEndpoint::NoneEligible));
    for listed in listed.into_iter().flatten() {
        match listed {
            PoolAnswer::Models(list) => {
                is_any = true;
                list.into_iter().for_each(|model| models.add(model));
            }
            PoolAnswer::Refused(response) => refused = refused.or(Some(response)),
            PoolAnswer::NoList(address, status) => {
                error = Error::Response { address, error: ResponseError::ModelList { status } };
            }
        }
    }
    let mut reply = match refused {
        _ if is_any => {
            named(config).for_each(|name| models.add_named(name));
            let body = Bytes::from(json!({ "object": "list", "data": models.list }).to_string());
            let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Reply { status: StatusCode::OK, headers: HeaderMap::from_iter([json]), body }
        }
        Some(response) => {
            let (mut head, body) = response.into_parts();
            headers::prepare_response(&mut head.headers, head.version, &request.parts.headers, &config.headers);
            Reply { status: head.status, headers: head.headers, body }
        }
        None => return Err(error),
    };
    request.manner(config).mark(&mut reply.headers);
    let keep_alive = request.keeps_alive(worker) && upload.is_done();
    client.reply(&request.parts.method, &reply, keep_alive).await.map_err(|_| Error::ClientGone)?;
    request.record.status(reply.status, "models");
    Ok(if keep_alive { AfterRequest::Next } else { AfterRequest::Close })
}

/// The fields that endpoints get: the client's, without those of its body and its conditions, for an answer that can be read.
fn fields(worker: &Worker, client: &HeaderMap) -> HeaderMap {
    let mut fields = client.clone();
    for name in [
        header::CONTENT_LENGTH,
        header::CONTENT_TYPE,
        header::CONTENT_ENCODING,
        header::TRAILER,
        header::EXPECT,
        header::ACCEPT_ENCODING,
        header::RANGE,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_UNMODIFIED_SINCE,
        header::IF_RANGE,
    ] {
        fields.remove(name);
    }
    fields.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    let _ = fields.try_append(headers::X_PENSTOCK_HOP, worker.shared.mark.clone());
    fields
}

/// The list of one pool; `None` if no endpoint answers.
async fn list(worker: &Worker, pool: usize, fields: &HeaderMap) -> Option<PoolAnswer> {
    let shared = &worker.shared;
    let settings = &shared.config.pools[pool];
    if settings.unusable.is_some() {
        return None;
    }
    let mut addresses: Vec<_> = shared.endpoints[pool].snapshot().ready().map(|endpoint| endpoint.address).collect();
    addresses.retain(|&address| !shared.own.accept(address));
    fastrand::shuffle(&mut addresses);
    shared.endpoints[pool].avoided_last(&mut addresses, std::time::Instant::now());
    for address in addresses.into_iter().take(ATTEMPTS) {
        let _place = worker.lists.acquire().await.ok()?;
        let tls = shared.endpoint_tls[pool].as_deref();
        let asked = SingleRequest { address, protocol: settings.app_protocol, tls };
        let path = PathAndQuery::from_static(LIST_PATH);
        let answer = asked.get(&path, fields.clone(), LIST);
        let limit = shared.config.models.timeout / ATTEMPTS as u32;
        match tokio::time::timeout(limit.max(Duration::from_millis(1)), answer).await {
            Ok(Ok(response)) => return Some(read(address, response)),
            Ok(Err(error)) => report(address, &error),
            Err(_) => tracing::debug!(%address, "endpoint did not list its models in time"),
        }
    }
    None
}

fn report(address: SocketAddr, error: &SingleError) {
    tracing::debug!(%address, %error, "endpoint did not list its models");
}

fn read(address: SocketAddr, response: Response<Bytes>) -> PoolAnswer {
    let status = response.status();
    let list = || match serde_json::from_slice(response.body()).ok()? {
        Value::Object(mut all) => match all.remove("data")? {
            Value::Array(list) => Some(list.into_iter().filter(|model| name(model).is_some()).take(MODELS).collect()),
            _ => None,
        },
        _ => None,
    };
    match list() {
        Some(list) if status.is_success() => PoolAnswer::Models(list),
        // The request had no condition and asked for no other protocol.
        _ if status.is_success() || status.is_informational() || status == StatusCode::NOT_MODIFIED => {
            PoolAnswer::NoList(address, status)
        }
        _ => PoolAnswer::Refused(response),
    }
}

/// The names by which clients may ask for models, whether or not an endpoint lists them.
fn named(config: &Config) -> impl Iterator<Item = &str> {
    let routed = config.routes.iter().flat_map(|route| &route.models).filter_map(|model| match model {
        ModelPattern::Exact(name) => Some(name.as_str()),
        _ => None,
    });
    routed.chain(config.bbr.base_models.keys().map(String::as_str))
}

fn name(model: &Value) -> Option<&str> {
    model.get("id").and_then(Value::as_str)
}

/// Models in the order of the pools, each name once.
#[derive(Default)]
struct MergedModels {
    list: Vec<Value>,
    names: HashSet<String>,
}

impl MergedModels {
    /// Adds an entry of an endpoint's list. One without a name is left out.
    fn add(&mut self, model: Value) {
        let Some(name) = name(&model).map(str::to_owned) else { return };
        if self.list.len() < MODELS && self.names.insert(name) {
            self.list.push(model);
        }
    }

    fn add_named(&mut self, name: &str) {
        self.add(json!({ "id": name, "object": "model", "created": 0, "owned_by": "penstock" }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(models: &MergedModels) -> Vec<&str> {
        models.list.iter().map(|model| model["id"].as_str().unwrap()).collect()
    }

    #[test]
    fn first_entry_of_a_name_is_kept() {
        let mut models = MergedModels::default();
        for model in
            [json!({"id": "a", "x": 1}), json!({"id": "b"}), json!({"id": "a", "x": 2}), json!({"id": 7}), json!("c")]
        {
            models.add(model);
        }
        models.add_named("b");
        models.add_named("alias");
        assert_eq!(ids(&models), ["a", "b", "alias"]);
        assert_eq!((&models.list[0]["x"], &models.list[2]["owned_by"]), (&json!(1), &json!("penstock")));
    }

    #[test]
    fn merged_list_is_bounded() {
        let mut models = MergedModels::default();
        (0..2 * MODELS).for_each(|number| models.add_named(&number.to_string()));
        assert_eq!(models.list.len(), MODELS);
    }

    #[test]
    fn answers_are_lists_or_refusals() {
        let read = |status: u16, body: &'static str| {
            let mut response = Response::new(Bytes::from_static(body.as_bytes()));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            read("192.0.2.1:80".parse().unwrap(), response)
        };
        assert!(matches!(read(200, r#"{"data": [{"id": "a"}]}"#), PoolAnswer::Models(list) if list.len() == 1));
        for body in ["", "[]", "{}", r#"{"data": {}}"#, r#"{"data": [}"#] {
            assert!(matches!(read(200, body), PoolAnswer::NoList(..)), "{body}");
        }
        for status in [101, 204, 304] {
            assert!(matches!(read(status, ""), PoolAnswer::NoList(..)), "{status}");
        }
        assert!(matches!(read(200, r#"{"data": [1, {}, []]}"#), PoolAnswer::Models(list) if list.is_empty()));
        assert!(matches!(read(401, r#"{"data": []}"#), PoolAnswer::Refused(response) if response.status() == 401));
    }
}
