//! Keeps the endpoint sets up to date from DNS names, files and health checks, as tasks on a thread of their own, so that no
//! worker waits for DNS, the disk or a slow endpoint.
//!
//! Readiness waits for each pool with a name or a file: the pool's gate opens when every source has given its endpoints once or,
//! after `PATIENCE`, when there is at least one endpoint.

use std::{convert::Infallible, io, sync::Arc, thread::JoinHandle, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{sync::oneshot, task::JoinSet};

use super::{
    check::Checks,
    feed::Feed,
    file, names,
    set::{EndpointSet, EndpointSource},
    tls::EndpointTls,
};
use crate::{
    config::{Config, Pool},
    dns::DnsResolver,
    listeners::Listeners,
    metrics::Metrics,
    panics::PanicWatch,
    readiness::{Gate, Readiness},
};

const THREAD: &str = "endpoints";

/// How long readiness waits for a source if the pool already has endpoints, and how long a pool keeps the endpoints of a name or
/// file that is not configured any more while the new one has not given any.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the discovery. Dropping it ends the tasks and the thread.
#[derive(Debug)]
pub struct Discovery(Option<DiscoveryThread>);

#[derive(Debug)]
struct DiscoveryThread {
    /// Dropping it stops the thread.
    stop: oneshot::Sender<Infallible>,
    thread: JoinHandle<()>,
}

/// The discovery of one pool.
struct DiscoveryJob {
    pool: Pool,
    index: usize,
    set: Arc<EndpointSet>,
    tls: Option<Arc<EndpointTls>>,
    /// `None` if readiness does not wait for this pool.
    gate: Option<Gate>,
}

impl Discovery {
    /// Starts the discovery. `sets` are those of the pools, in the order of the configuration, as `tls`. `own` are the agent's
    /// listeners.
    /// Without `readiness` there are no gates. Starts no thread if no pool needs one. Fails if the runtime or the thread cannot be
    /// created.
    pub fn start(
        config: &Config,
        sets: &[Arc<EndpointSet>],
        tls: &[Option<Arc<EndpointTls>>],
        metrics: &Arc<Metrics>,
        own: &Listeners,
        readiness: Option<&Readiness>,
        watch: &PanicWatch,
    ) -> io::Result<Self> {
        let job = |index: usize| {
            let (pool, set, tls) = (&config.pools[index], &sets[index], &tls[index]);
            let followed = pool.endpoints_dns.is_some() || pool.endpoints_file.is_some();
            let gate = readiness
                .filter(|_| followed)
                .map(|readiness| readiness.gate(format!("endpoints of pool {}", pool.name)));
            let needed = followed || pool.health.is_some();
            needed.then(|| DiscoveryJob { pool: pool.clone(), index, set: Arc::clone(set), tls: tls.clone(), gate })
        };
        let jobs: Vec<DiscoveryJob> = (0..config.pools.len()).filter_map(job).collect();
        if jobs.is_empty() {
            return Ok(Self(None));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<Infallible>();
        let (config, metrics, own) = (config.clone(), Arc::clone(metrics), own.clone());
        let watch = watch.clone();
        let work = move || {
            runtime.block_on(async {
                let mut tasks = tasks(jobs, &config, &metrics, &own);
                let all = async {
                    while let Some(ended) = tasks.join_next().await {
                        if let Some(panic) = ended.err().and_then(|error| error.try_into_panic().ok()) {
                            std::panic::resume_unwind(panic);
                        }
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = all => {}
                    _ = stopped => {}
                }
            });
            // Does not wait for a blocked file system.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work))?;
        Ok(Self(Some(DiscoveryThread { stop, thread })))
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        if let Some(DiscoveryThread { stop, thread }) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

/// Starts the tasks of all pools. They end when the returned set is dropped.
fn tasks(jobs: Vec<DiscoveryJob>, config: &Config, metrics: &Arc<Metrics>, own: &Listeners) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let dns = DnsResolver::new(&config.dns);
    for DiscoveryJob { pool, index, set, tls, gate } in jobs {
        let first_answers = FuturesUnordered::new();
        let feed = |source| {
            let (unanswered, first_answer) = oneshot::channel();
            first_answers.push(first_answer);
            Feed {
                pool: pool.name.clone(),
                index,
                source,
                set: Arc::clone(&set),
                metrics: Arc::clone(metrics),
                listen: config.listen.address,
                unanswered: Some(unanswered),
                failing: false,
            }
        };
        if let Some(named) = pool.endpoints_dns.clone() {
            tasks.spawn(names::follow(named, dns.clone(), own.clone(), feed(EndpointSource::Dns)));
        }
        if let Some(path) = pool.endpoints_file.clone() {
            tasks.spawn(file::follow(path, pool.ports.clone(), feed(EndpointSource::File)));
        }
        if let Some(rules) = pool.health.clone() {
            let checks = Checks {
                pool: pool.name.clone(),
                index,
                rules,
                protocol: pool.app_protocol,
                tls,
                set: Arc::clone(&set),
                metrics: Arc::clone(metrics),
            };
            tasks.spawn(checks.run());
        }
        for source in [EndpointSource::File, EndpointSource::Dns] {
            if let Some(since) = set.outdated_since(source) {
                let patience = tokio::time::sleep(PATIENCE.saturating_sub(since.elapsed()));
                let (pool, set) = (pool.name.clone(), Arc::clone(&set));
                tasks.spawn(async move { remove_outdated(source, patience, &pool, &set).await });
            }
        }
        if let Some(gate) = gate {
            let patience = tokio::time::sleep(PATIENCE);
            tasks.spawn(async move { open_when_answered(first_answers, patience, &set, gate).await });
        }
    }
    tasks
}

async fn remove_outdated(source: EndpointSource, patience: impl Future<Output = ()>, pool: &str, set: &EndpointSet) {
    patience.await;
    let (endpoints, source) = (set.remove_outdated(source), source.name());
    if endpoints > 0 {
        tracing::warn!(
            pool,
            source,
            endpoints,
            "endpoint source failed since its setting changed, removing the previous endpoints"
        );
    }
}

async fn open_when_answered(
    mut first_answers: FuturesUnordered<oneshot::Receiver<()>>,
    patience: impl Future<Output = ()>,
    set: &EndpointSet,
    gate: Gate,
) {
    let all_answered = tokio::select! {
        biased;
        () = async { while first_answers.next().await.is_some() {} } => true,
        () = patience => false,
    };
    while !all_answered && set.snapshot().endpoints().is_empty() && first_answers.next().await.is_some() {}
    gate.open();
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, pin::pin};

    use futures_util::FutureExt as _;

    use super::*;
    use crate::config::{Ejection, Node};

    fn address() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], 8000))
    }

    fn set(endpoints: &[SocketAddr]) -> EndpointSet {
        EndpointSet::of(endpoints.iter().copied(), Ejection::default())
    }

    /// Two sources, and the receivers that wait for their first answers.
    fn sources() -> ([oneshot::Sender<()>; 2], FuturesUnordered<oneshot::Receiver<()>>) {
        let ((one, first), (two, second)) = (oneshot::channel(), oneshot::channel());
        ([one, two], [first, second].into_iter().collect())
    }

    #[test]
    fn gate_opens_when_all_sources_have_answered() {
        let (readiness, set, ([one, two], answers)) = (Readiness::new(), set(&[address()]), sources());
        let mut wait = pin!(open_when_answered(answers, std::future::pending(), &set, readiness.gate("a")));
        drop(one);
        assert!(wait.as_mut().now_or_never().is_none() && !readiness.is_ready());
        drop(two);
        assert!(wait.as_mut().now_or_never().is_some() && readiness.is_ready());
    }

    #[test]
    fn gate_with_endpoints_opens_after_the_patience() {
        let (readiness, set, (_unanswered, answers)) = (Readiness::new(), set(&[address()]), sources());
        let (over, patience) = oneshot::channel::<()>();
        let mut wait = pin!(open_when_answered(answers, patience.map(drop), &set, readiness.gate("a")));
        assert!(wait.as_mut().now_or_never().is_none() && !readiness.is_ready());
        drop(over);
        assert!(wait.as_mut().now_or_never().is_some() && readiness.is_ready());
    }

    #[test]
    fn gate_without_endpoints_waits_after_the_patience() {
        let (readiness, set, ([one, _two], answers)) = (Readiness::new(), set(&[]), sources());
        let mut wait = pin!(open_when_answered(answers, std::future::ready(()), &set, readiness.gate("a")));
        assert!(wait.as_mut().now_or_never().is_none() && !readiness.is_ready());
        set.replace(EndpointSource::File, vec![address().into()]);
        drop(one);
        assert!(wait.as_mut().now_or_never().is_some() && readiness.is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_of_another_file_are_kept_for_the_patience() {
        let (before, metrics) = (Pool::new("p", []), Metrics::new(&["p".to_owned()]));
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Pool { endpoints_file: Some(folder.path().join(name)), ..before.clone() };
        let (first, missing) = (at("first"), at("missing"));
        let set = Arc::new(EndpointSet::new(&first, &Node::default()));
        set.replace(EndpointSource::File, vec![address().into()]);
        set.configure(&first, &missing, std::time::Instant::now());
        let config = Config::new(vec![missing.clone()]);
        let job = DiscoveryJob { pool: missing, index: 0, set: Arc::clone(&set), tls: None, gate: None };
        let _tasks = tasks(vec![job], &config, &metrics, &Listeners::default());
        let count = || set.snapshot().endpoints().len();
        tokio::time::sleep(PATIENCE - Duration::from_millis(500)).await;
        assert_eq!(count(), 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(count(), 0);
    }
}
