//! A request in progress, and what happens to the client's connection after it.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Uri, request};
use tokio::time::Instant;

use super::record::{Origin, Record};
use crate::{
    config::{Config, ModelList},
    deadline::with_deadline,
    endpoint::connection::EndpointConnection,
    error::{Error, Manner},
    http::{
        cors::Grant,
        request::{LONGEST_TARGET, RequestError},
    },
    kernel::wire::TcpConnection,
    metrics::PoolMetrics,
    rename::ModelNames,
    route::{RequestTimeouts, RouteChanges, TargetTooLong},
    steer::reason::SteerReason,
    worker::Worker,
};

/// What happens to the client's connection after a request.
pub enum AfterRequest {
    /// Read the next request.
    Next,
    /// Relay to this endpoint from now on.
    Pinned(Box<Pin>),
    /// Orderly close.
    Close,
    /// Close in the middle of a message.
    Abort,
}

/// When a request, including its response, has to be complete.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Deadline {
    pub(super) at: Option<Instant>,
    pub(super) limit: Duration,
}

impl Deadline {
    fn new(begun: Instant, limit: Option<Duration>) -> Self {
        Self { at: limit.map(|limit| begun + limit), limit: limit.unwrap_or_default() }
    }

    /// Runs a phase before the response. Returns `RequestTimeout` at the deadline.
    pub(super) async fn limit<T, E: From<Error>>(self, phase: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        with_deadline(self.at, phase).await.unwrap_or_else(|| Err(Error::RequestTimeout(self.limit).into()))
    }
}

/// A request in progress, passed from phase to phase.
pub(super) struct Request {
    pub(super) parts: request::Parts,
    /// The target that the EPP was told, while `parts` has the one for the endpoint.
    pub(super) client_target: Option<Uri>,
    /// The target as the client sent it, if the route changed the request.
    sent_target: Option<Uri>,
    pub(super) keep_alive: bool,
    /// The protocol that the client wants to switch to.
    pub(super) upgrade: Option<HeaderValue>,
    pub(super) pool: usize,
    /// The agent answers it with the models of all pools.
    pub(super) lists_models: bool,
    /// Its body asks for a stream.
    pub(super) streams: bool,
    pub(super) record: Record,
    /// The client socket's key in the kernel's map, if path `local` is possible.
    pub(super) target: Option<u64>,
    /// The client's connection, if the response may take path `wire`, or why not; `None` if the path is not in use.
    pub(super) wire: Option<Result<TcpConnection, SteerReason>>,
    /// Set if the EPP changed the model.
    pub(super) names: Option<ModelNames>,
    /// Which origin may read the response, with `listen.cors`.
    pub(super) grant: Option<Grant>,
    /// When its first byte arrived.
    pub(super) begun: Instant,
    /// From when on its response is the last one of the connection.
    pub(super) last_at: Option<Instant>,
    pub(super) timeouts: RequestTimeouts,
    pub(super) deadline: Deadline,
}

/// Where OpenAI's API has the list of models.
pub(super) const LIST_PATH: &str = "/v1/models";

/// Whether the agent answers a request with this head, as the client sent it, with the models of all pools.
fn lists_models(config: &Config, head: &request::Parts) -> bool {
    let is_read = matches!(head.method, Method::GET | Method::HEAD);
    config.models.list == ModelList::Merged && is_read && head.uri.path() == LIST_PATH
}

impl Request {
    /// The request with this head. Its pool is set by routing.
    pub(super) fn new(config: &Config, parts: request::Parts, keep_alive: bool, origin: Origin) -> Self {
        let timeouts = RequestTimeouts::from(&config.timeouts);
        Self {
            lists_models: lists_models(config, &parts),
            grant: config.listen.cors.as_ref().map(|cors| Grant::of(cors, &parts.headers)),
            begun: origin.begun,
            last_at: origin.last_at,
            record: Record::new(origin),
            parts,
            client_target: None,
            sent_target: None,
            keep_alive,
            upgrade: None,
            pool: 0,
            streams: false,
            target: None,
            wire: None,
            names: None,
            timeouts,
            deadline: Deadline::default(),
        }
    }

    /// Applies these timeouts from now on.
    pub(super) fn set_timeouts(&mut self, timeouts: RequestTimeouts) {
        self.timeouts = timeouts;
        self.deadline = Deadline::new(self.begun, timeouts.request);
    }

    /// Sets the fields of a response that tell which origin may read it.
    pub(super) fn apply_grant(&self, config: &Config, response: &mut HeaderMap) {
        if let (Some(cors), Some(grant)) = (&config.listen.cors, &self.grant) {
            grant.apply(cors, response);
        }
    }

    /// How the agent's own answer to it is formatted.
    pub(super) fn manner<'r>(&'r self, config: &'r Config) -> Manner<'r> {
        let manner = Manner::of(&self.parts.headers, config).at(self.parts.uri.path());
        manner.to(config.listen.cors.as_ref(), self.grant.as_ref())
    }

    /// The dispatch begins: `timeouts.dispatch` applies from now on.
    pub(super) fn begin_dispatch(&mut self) {
        let Some(limit) = self.timeouts.dispatch else { return };
        let dispatched = Deadline::new(Instant::now(), Some(limit));
        if self.deadline.at.is_none_or(|at| dispatched.at.is_some_and(|dispatched| dispatched < at)) {
            self.deadline = dispatched;
        }
    }

    /// Applies the changes of the route.
    pub(super) fn change(&mut self, changes: &RouteChanges) -> Result<(), Error> {
        self.sent_target = Some(self.parts.uri.clone());
        let limit = LONGEST_TARGET;
        changes.apply(&mut self.parts).map_err(|TargetTooLong| RequestError::TargetTooLong { limit }.into())
    }

    /// Whether the route changed the request.
    pub(super) fn is_changed(&self) -> bool {
        self.sent_target.is_some()
    }

    /// Sets the target again that the EPP was told.
    pub(super) fn restore_target(&mut self) {
        if let Some(target) = self.client_target.take() {
            self.parts.uri = target;
        }
    }

    /// Sets the target again that the client sent, for the answer to the client and the accounts.
    pub(super) fn restore_sent_target(&mut self) {
        self.restore_target();
        if let Some(target) = self.sent_target.take() {
            self.parts.uri = target;
        }
    }

    /// Whether the connection stays open after a response whose head is written now.
    pub(super) fn keeps_alive(&self, worker: &Worker) -> bool {
        let is_last = || self.last_at.is_some_and(|at| at <= Instant::now());
        self.keep_alive && !worker.shared.leaving.is_cancelled() && !is_last()
    }
}

/// The endpoint connection that a client connection is pinned to.
pub struct Pin {
    pub(super) endpoint: EndpointConnection,
    /// The name of the pool, and its metrics.
    pub(super) pool: String,
    pub(super) metrics: Arc<PoolMetrics>,
    /// After this time the pin ends at the next quiet second.
    pub(super) age: Option<Duration>,
    pub(super) target: Option<u64>,
    /// The idle timeout of the first request's route.
    pub(super) idle: Option<Duration>,
}
