//! A Kubernetes API server for tests, over real HTTP/1.1: lists in pages, watches with bookmarks, label and field selectors, and the
//! failures that clients have to expect. Written to sockets directly, because tests decide where an answer breaks off.
//!
//! It follows the API's conventions: each change gets a version; a watch continues after a version; versions that were compacted
//! are gone (410); a DELETED event has the object's last state and a new version.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::{net::TcpListener, sync::watch};

use crate::own_runtime::OwnRuntime;

mod answer;
mod cluster;
mod connection;
pub mod objects;

use cluster::Cluster;

/// How the server fails.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Answers every request with this status.
    pub status: Option<u16>,
    /// Answers requests whose path ends with one of these, such as `pods` or `models/pods`, with 403.
    pub forbidden: &'static [&'static str],
    /// Answers requests whose path contains one of these with 404, as if its CRD were not installed.
    pub missing: &'static [&'static str],
    /// Says that a version is gone by an event of the watch instead of by the status.
    pub gone_as_event: bool,
    /// Watches are silent and never end, as if their connection had died without a sign.
    pub silent: bool,
    /// Ends watches in the middle of a line instead of between events.
    pub cut_in_line: bool,
    /// Sends answers in pieces of seven bytes with this pause.
    pub pace: Option<Duration>,
    /// How watches fail.
    pub watches: Option<WatchFault>,
    /// Answers lists of this resource after this time.
    pub slow_lists: Option<(&'static str, Duration)>,
    /// Most objects of a page, below what the client asks for.
    pub page: Option<usize>,
}

/// How a watch fails.
#[derive(Clone, Copy, Debug)]
pub enum WatchFault {
    /// It is answered with this status, after this time.
    Refused(u16, Duration),
    /// It is accepted and ends at once.
    Ended,
}

struct State {
    cluster: Mutex<Cluster>,
    faults: Mutex<Faults>,
    /// Method and target of each request.
    requests: Mutex<Vec<String>>,
    /// Changes when watches have to look for something.
    news: watch::Sender<News>,
}

#[derive(Clone, Copy, Default)]
struct News {
    /// Watches of an earlier number end.
    cuts: u64,
    bookmarks: u64,
    changes: u64,
}

/// A running API server. Dropping it closes its port and all connections.
pub struct ApiServer {
    pub addr: SocketAddr,
    state: Arc<State>,
    runtime: Option<OwnRuntime>,
}

impl ApiServer {
    /// Returns once the port is open. Runs on its own thread.
    pub async fn start() -> Result<Self> {
        let state = State {
            cluster: Mutex::default(),
            faults: Mutex::default(),
            requests: Mutex::default(),
            news: watch::Sender::default(),
        };
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut server = Self { addr, state: Arc::new(state), runtime: None };
        server.restart().await?;
        Ok(server)
    }

    /// Closes the port and all connections at once. The objects stay.
    pub fn stop(&mut self) {
        self.runtime = None;
    }

    /// Starts again on the same port.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop();
        let (addr, state) = (self.addr, Arc::clone(&self.state));
        let begin = async move || {
            let listener = TcpListener::bind(addr).await?;
            let addr = listener.local_addr()?;
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(connection::serve(stream, Arc::clone(&state)));
                }
            });
            Ok(addr)
        };
        let (addr, runtime) = OwnRuntime::start("api-server", begin).await?;
        (self.addr, self.runtime) = (addr, Some(runtime));
        Ok(())
    }

    /// A kubeconfig that names this server.
    pub fn kubeconfig(&self) -> NamedTempFile {
        let file = NamedTempFile::new().expect("a temporary file");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", self.addr) } }],
            "users": [{ "name": "u", "user": {} }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        std::fs::write(file.path(), config.to_string()).expect("a file that can be written");
        file
    }

    /// Creates or replaces an object, which has its kind and its namespace in it.
    pub fn apply(&self, object: Value) {
        self.state.cluster.lock().apply(object);
        self.tell(|news| news.changes += 1);
    }

    /// Deletes an object, such as `pods`, `n`, `a`. Panics if there is none.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.state.cluster.lock().delete(plural, namespace, name);
        self.tell(|news| news.changes += 1);
    }

    /// Forgets how the present state came about, so that watches from before are gone.
    pub fn compact(&self) {
        self.state.cluster.lock().compact();
    }

    /// Sends a bookmark to every watch.
    pub fn bookmark(&self) {
        self.tell(|news| news.bookmarks += 1);
    }

    /// Ends every watch.
    pub fn cut(&self) {
        self.tell(|news| news.cuts += 1);
    }

    /// Fails differently from now on.
    pub fn fail(&self, faults: Faults) {
        *self.state.faults.lock() = faults;
        self.tell(|_| {});
    }

    /// How many requests there were whose target contains each of `parts`.
    pub fn requests(&self, parts: &[&str]) -> usize {
        let requests = self.state.requests.lock();
        requests.iter().filter(|request| parts.iter().all(|part| request.contains(part))).count()
    }

    /// How many lists of a resource there were, continued ones included.
    pub fn lists(&self, plural: &str) -> usize {
        self.requests(&[&format!("/{plural}?")]) - self.watches(plural)
    }

    /// How many watches of a resource there were.
    pub fn watches(&self, plural: &str) -> usize {
        self.requests(&[&format!("/{plural}?"), "watch=true"])
    }

    fn tell(&self, change: impl FnOnce(&mut News)) {
        self.state.news.send_modify(change);
    }
}
