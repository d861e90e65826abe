//! Whether the agent takes traffic: named gates that start closed, and a drain that cannot be undone.
//!
//! Each part that must be up before the first request holds a [`Gate`] and opens it. `/readyz` lists the closed gates,
//! so that a start that hangs shows where. All gates must be created before the admin server starts, because an agent
//! without gates counts as ready.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The readiness of one agent. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<SharedReadiness>);

#[derive(Debug, Default)]
struct SharedReadiness {
    state: Mutex<ReadinessState>,
    /// Notified when a gate opens.
    opened: Notify,
}

#[derive(Debug, Default)]
struct ReadinessState {
    closed: Vec<String>,
    failed: Vec<String>,
    draining: bool,
}

impl Readiness {
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a closed gate. Gates may share a name; each has to be opened.
    pub fn gate(&self, name: impl Into<String>) -> Gate {
        let name = name.into();
        self.0.state.lock().closed.push(name.clone());
        Gate { name, readiness: self.clone() }
    }

    /// Makes the agent unready for good. Load balancers stop sending; running responses continue.
    pub fn draining(&self) {
        self.0.state.lock().draining = true;
    }

    /// Makes the agent unready for good, because of `what`.
    pub fn fail(&self, what: impl Into<String>) {
        self.0.state.lock().failed.push(what.into());
    }

    pub fn is_draining(&self) -> bool {
        self.0.state.lock().draining
    }

    pub fn is_ready(&self) -> bool {
        let state = self.0.state.lock();
        state.closed.is_empty() && state.failed.is_empty() && !state.draining
    }

    /// Resolves when the agent is ready. Cancel-safe.
    pub async fn ready(&self) {
        loop {
            let opened = self.0.opened.notified();
            if self.is_ready() {
                return;
            }
            opened.await;
        }
    }

    /// What keeps the agent from being ready, each name once: a drain, then failed parts, then closed gates in creation
    /// order. Empty if the agent is ready.
    pub fn pending(&self) -> Vec<String> {
        let state = self.0.state.lock();
        let mut names: Vec<String> = Vec::new();
        let gates = state.failed.iter().chain(&state.closed).map(String::as_str);
        for name in state.draining.then_some("draining").into_iter().chain(gates) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        names
    }
}

/// A gate that holds back readiness. If dropped without [`Gate::open`] it stays closed: a part that failed to start
/// must not make the agent ready.
#[derive(Debug)]
#[must_use = "a gate that is dropped stays closed for good"]
pub struct Gate {
    name: String,
    readiness: Readiness,
}

impl Gate {
    pub fn open(self) {
        let SharedReadiness { state, opened } = &*self.readiness.0;
        let mut state = state.lock();
        if let Some(index) = state.closed.iter().position(|name| *name == self.name) {
            state.closed.remove(index);
        }
        drop(state);
        opened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_is_ready_when_every_gate_is_open() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let listeners = readiness.gate("listeners");
        let picker = readiness.gate("picker");
        assert_eq!(readiness.pending(), ["listeners", "picker"]);
        listeners.open();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.pending(), ["picker"]);
        picker.open();
        assert!(readiness.is_ready());
        assert!(readiness.pending().is_empty());
    }

    #[tokio::test]
    async fn last_gate_wakes_who_waits_for_readiness() {
        let readiness = Readiness::new();
        let gates = [readiness.gate("listeners"), readiness.gate("picker")];
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        for gate in gates {
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            gate.open();
        }
        waiting.await.unwrap();
        readiness.ready().await;
    }

    #[test]
    fn gates_with_the_same_name_open_separately() {
        let readiness = Readiness::new();
        let gates = [readiness.gate("listeners"), readiness.gate("listeners")];
        assert_eq!(readiness.pending(), ["listeners"]);
        for gate in gates {
            assert!(!readiness.is_ready());
            gate.open();
        }
        assert!(readiness.is_ready());
    }

    #[test]
    fn dropped_gate_stays_closed() {
        let readiness = Readiness::new();
        drop(readiness.gate("steering"));
        assert_eq!(readiness.pending(), ["steering"]);
    }

    #[test]
    fn failed_part_keeps_the_agent_unready() {
        let readiness = Readiness::new();
        readiness.gate("worker 0").open();
        readiness.fail("failed: worker 0");
        assert!(!readiness.is_ready());
        assert_eq!(readiness.pending(), ["failed: worker 0"]);
    }

    #[test]
    fn draining_keeps_the_agent_unready() {
        let readiness = Readiness::new();
        let gate = readiness.gate("picker");
        readiness.clone().draining();
        assert_eq!(readiness.pending(), ["draining", "picker"]);
        gate.open();
        assert!(!readiness.is_ready() && readiness.is_draining());
        assert_eq!(readiness.pending(), ["draining"]);
    }
}
