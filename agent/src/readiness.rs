//! Whether the agent takes traffic: named gates that start closed, and a drain that never ends.
//!
//! Each part that must be up before the first request holds a [`Gate`] and opens it. The names of those still closed are
//! what `/readyz` answers, so a start that hangs says where. All gates are made before the admin server starts:
//! with none, the agent counts as ready.

use std::sync::Arc;

use parking_lot::Mutex;

/// Shared by cloning.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    closed: Vec<String>,
    failed: Vec<String>,
    draining: bool,
}

impl Readiness {
    pub fn new() -> Self {
        Self::default()
    }

    /// A closed gate. Gates may share a name; each is opened for itself.
    pub fn gate(&self, name: impl Into<String>) -> Gate {
        let name = name.into();
        self.state.lock().closed.push(name.clone());
        Gate { name, state: Arc::clone(&self.state) }
    }

    /// Not ready from here on, whatever gates open: load balancers stop sending, running responses go on.
    pub fn draining(&self) {
        self.state.lock().draining = true;
    }

    /// Not ready from here on, because of this.
    pub fn fail(&self, what: impl Into<String>) {
        self.state.lock().failed.push(what.into());
    }

    pub fn is_draining(&self) -> bool {
        self.state.lock().draining
    }

    pub fn is_ready(&self) -> bool {
        let state = self.state.lock();
        state.closed.is_empty() && state.failed.is_empty() && !state.draining
    }

    /// What keeps the agent from being ready, each name once: a drain, what has failed, then gates in the order they were made.
    /// Empty when the agent is ready.
    pub fn pending(&self) -> Vec<String> {
        let state = self.state.lock();
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

/// Dropped without [`Gate::open`] it stays closed: a part that failed to start must not make the agent ready.
#[derive(Debug)]
#[must_use = "a gate that is dropped stays closed for good"]
pub struct Gate {
    name: String,
    state: Arc<Mutex<State>>,
}

impl Gate {
    pub fn open(self) {
        let mut state = self.state.lock();
        if let Some(index) = state.closed.iter().position(|name| *name == self.name) {
            state.closed.remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_gate_is_open() {
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

    #[test]
    fn gates_of_one_name_open_one_by_one() {
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
    fn a_dropped_gate_stays_closed() {
        let readiness = Readiness::new();
        drop(readiness.gate("steering"));
        assert_eq!(readiness.pending(), ["steering"]);
    }

    #[test]
    fn failed_part_is_for_good() {
        let readiness = Readiness::new();
        readiness.gate("worker 0").open();
        readiness.fail("failed: worker 0");
        assert!(!readiness.is_ready());
        assert_eq!(readiness.pending(), ["failed: worker 0"]);
    }

    #[test]
    fn draining_is_for_good() {
        let readiness = Readiness::new();
        let gate = readiness.gate("picker");
        readiness.clone().draining();
        assert_eq!(readiness.pending(), ["draining", "picker"]);
        gate.open();
        assert!(!readiness.is_ready() && readiness.is_draining());
        assert_eq!(readiness.pending(), ["draining"]);
    }
}
