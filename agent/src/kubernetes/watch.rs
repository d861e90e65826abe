//! Keeps a [`Store`] equal to what a query selects: a list, then a watch from the list's version, again from the last version that
//! an event or a bookmark named, and another list if that version is gone. The store keeps its objects until a new list is whole.
//!
//! kube's own watcher says neither that a watch runs again nor that a bookmark came, so neither `up` nor the time of the last sign
//! of life could be known with it.

use std::{panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, TryStreamExt as _};
use kube::{Client, core::WatchEvent};
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout};

use super::{
    failure::Failure,
    objects::Object,
    query::Query,
    store::{MAX_OBJECTS, Store},
};
use crate::metrics::WatchMetrics;

/// How long one page of a list, and the beginning of a watch, may take.
const ANSWER: Duration = Duration::from_secs(30);
/// How much longer than a watch may last its connection may be silent.
const SILENCE: Duration = Duration::from_secs(5);
/// Pauses after failures: the first, and the longest.
const FIRST: Duration = Duration::from_millis(200);
const MOST: Duration = Duration::from_secs(15);
/// A watch that stays open this long works, and is renewed at once. Shorter than the shortest time that is asked for.
const STABLE: Duration = Duration::from_millis(500);
/// Failures in a row after which the version may be what is wrong, so that a list is needed.
const MOST_FAILURES: u32 = 3;

/// What a watch asks, and with what.
pub(super) struct WatchParameters {
    pub(super) client: Client,
    /// For the log.
    pub(super) subject: String,
    pub(super) query: Query,
    /// How long one watch request lasts.
    pub(super) lasts: Duration,
}

/// How a watch ended.
enum WatchEnded {
    /// Orderly, such as after its time.
    Closed,
    /// Only a list can tell what has changed.
    Stale(Failure),
    Failed(Failure),
}

/// Watches until the future is dropped. Restarts after a panic, which the panic hook has counted.
pub(super) async fn keep_watching<K: Object + PartialEq>(
    source: WatchParameters,
    store: Arc<Store<K>>,
    metrics: WatchMetrics,
) {
    while AssertUnwindSafe(keep(&source, &store, &metrics)).catch_unwind().await.is_err() {
        sleep(MOST).await;
    }
}

async fn keep<K: Object + PartialEq>(source: &WatchParameters, store: &Store<K>, metrics: &WatchMetrics) {
    let mut report = Report { metrics, source, failing: None, is_full: false };
    let mut pause = Pause::default();
    let mut is_first = true;
    loop {
        match source.list(store).await {
            Ok((objects, version)) => {
                if !std::mem::take(&mut is_first) {
                    report.metrics.relisted();
                }
                let (count, left_out) = store.replace(objects);
                report.counted(count, left_out > 0);
                report.metrics.synced();
                watch_from(version, source, store, &mut report, &mut pause).await;
            }
            Err(failure) => report.failed(&failure),
        }
        sleep(pause.next()).await;
    }
}

/// Watches until a list is needed.
async fn watch_from<K: Object + PartialEq>(
    mut version: String,
    source: &WatchParameters,
    store: &Store<K>,
    report: &mut Report<'_>,
    pause: &mut Pause,
) {
    let mut failures = 0;
    loop {
        let (begun, mut works) = (Instant::now(), false);
        let ended = source.watch(&mut version, store, report, &mut works).await.unwrap_or_else(WatchEnded::Failed);
        let is_stable = works && begun.elapsed() >= STABLE;
        if is_stable {
            pause.reset();
        }
        if works {
            failures = 0;
        }
        let failure = match ended {
            WatchEnded::Closed if is_stable => continue,
            WatchEnded::Closed if works => None,
            WatchEnded::Closed => Some(source.closed()),
            WatchEnded::Stale(failure) => {
                report.failed(&failure);
                return;
            }
            WatchEnded::Failed(failure) => Some(failure),
        };
        if let Some(failure) = failure {
            report.failed(&failure);
            failures += 1;
            if failures == MOST_FAILURES {
                return;
            }
        }
        sleep(pause.next()).await;
    }
}

#[derive(Deserialize)]
struct Page<K> {
    metadata: PageMetadata,
    /// Null in an empty list.
    items: Option<Vec<K>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMetadata {
    resource_version: String,
    /// The token for the next page; empty on the last one.
    #[serde(default)]
    r#continue: String,
}

impl WatchParameters {
    /// All objects, and the version of the list.
    async fn list<K: Object + PartialEq>(&self, store: &Store<K>) -> Result<(Vec<K>, String), Failure> {
        let failed = |error: &kube::Error| Failure::new(error, "list", &self.query);
        let (mut objects, mut next) = (Vec::new(), None);
        loop {
            let request =
                self.query.list(next.as_deref()).map_err(|error| failed(&kube::Error::BuildRequest(error)))?;
            let page = timeout(ANSWER, self.client.request::<Page<K>>(request)).await;
            let page = page.map_err(|_| Failure::timed_out("list", &self.query))?.map_err(|error| failed(&error))?;
            // What exceeds the limit is only counted, so that no list fills the memory.
            let room = (2 * MAX_OBJECTS).saturating_sub(objects.len());
            let kept = page.items.into_iter().flatten().filter(|object: &K| store.keeps(object));
            objects.extend(kept.take(room).map(|mut object| {
                object.take_version();
                object
            }));
            if page.metadata.r#continue.is_empty() {
                return Ok((objects, page.metadata.resource_version));
            }
            next = Some(page.metadata.r#continue);
        }
    }

    /// Applies changes to the store until the watch ends. `version` is then that of the last change, and `works` says whether an event
    /// came or the watch stayed open: a server may accept a watch and end it at once, each time.
    async fn watch<K: Object + PartialEq>(
        &self,
        version: &mut String,
        store: &Store<K>,
        report: &mut Report<'_>,
        works: &mut bool,
    ) -> Result<WatchEnded, Failure> {
        let failed = |error: &kube::Error| Failure::new(error, "watch", &self.query);
        let request = self.query.watch(version, self.lasts);
        let request = request.map_err(|error| failed(&kube::Error::BuildRequest(error)))?;
        let events = timeout(ANSWER, self.client.request_events::<K>(request)).await;
        let events = match events.map_err(|_| Failure::timed_out("watch", &self.query))? {
            Ok(events) => events,
            Err(error) => return Ok(self.broken(&error)),
        };
        let mut events = pin!(events);
        loop {
            let limit = if *works { self.lasts + SILENCE } else { STABLE };
            let event = match timeout(limit, events.try_next()).await {
                Ok(Ok(Some(event))) => Some(event),
                Ok(Ok(None)) => return Ok(WatchEnded::Closed),
                Ok(Err(error)) => return Ok(self.broken(&error)),
                Err(_) if *works => return Err(Failure::timed_out("watch", &self.query)),
                Err(_) => None,
            };
            let is_error = matches!(event, Some(WatchEvent::Error(_)));
            if !is_error && !std::mem::replace(works, true) {
                report.works();
            }
            let Some(event) = event else { continue };
            report.metrics.synced();
            match event {
                WatchEvent::Added(mut object) | WatchEvent::Modified(mut object) => {
                    *version = object.take_version();
                    let (count, is_left_out) = store.apply(object);
                    report.counted(count, is_left_out);
                }
                WatchEvent::Deleted(mut object) => {
                    *version = object.take_version();
                    report.counted(store.remove(&object.key()), false);
                }
                WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
                WatchEvent::Error(status) => {
                    return Ok(WatchEnded::Stale(Failure::status(&status, "watch", &self.query)));
                }
            }
        }
    }

    fn closed(&self) -> Failure {
        Failure::other("closed", format!("the API server ended the watch of {} at once", self.query.resource))
    }

    fn broken(&self, error: &kube::Error) -> WatchEnded {
        let failure = Failure::new(error, "watch", &self.query);
        if failure.is_gone { WatchEnded::Stale(failure) } else { WatchEnded::Failed(failure) }
    }
}

/// Tells the log and the metrics, each thing once.
struct Report<'a> {
    metrics: &'a WatchMetrics,
    source: &'a WatchParameters,
    /// What failed last, until something works.
    failing: Option<Failure>,
    is_full: bool,
}

impl Report<'_> {
    fn works(&mut self) {
        self.metrics.up(true);
        self.metrics.synced();
        if self.failing.take().is_some_and(|failure| !failure.is_gone) {
            let (subject, resource) = self.subject();
            tracing::info!(subject, resource, "Kubernetes watch recovered");
        }
    }

    fn failed(&mut self, failure: &Failure) {
        self.metrics.failed(failure.reason);
        self.metrics.up(false);
        let (subject, resource) = self.subject();
        if self.failing.as_ref() == Some(failure) {
            tracing::debug!(subject, resource, error = %failure, "Kubernetes watch still fails");
        } else if failure.is_gone {
            tracing::info!(subject, resource, "Kubernetes watch cannot continue, listing again");
        } else {
            tracing::warn!(subject, resource, error = %failure, "Kubernetes watch failed, keeping the last known objects");
        }
        self.failing = Some(failure.clone());
    }

    fn counted(&mut self, count: usize, some_left_out: bool) {
        self.metrics.objects(count);
        if some_left_out && !self.is_full {
            let (subject, resource) = self.subject();
            tracing::error!(subject, resource, limit = MAX_OBJECTS, "too many objects, leaving out further ones");
        }
        self.is_full |= some_left_out;
    }

    fn subject(&self) -> (&str, &'static str) {
        (&self.source.subject, self.source.query.resource.plural)
    }
}

/// The pauses between attempts: each twice as long as the one before, and up to a half shorter, so that agents do not ask in step.
#[derive(Default)]
struct Pause {
    last: Duration,
}

impl Pause {
    fn next(&mut self) -> Duration {
        self.last = (2 * self.last).clamp(FIRST, MOST);
        self.last.mul_f64(1.0 - fastrand::f64() / 2.0)
    }

    fn reset(&mut self) {
        self.last = Duration::ZERO;
    }
}
