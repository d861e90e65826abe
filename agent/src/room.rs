//! Limits the concurrent client connections over all workers and listeners, and closes idle ones to make room.
//!
//! At the limit, the connection that has been idle longest is closed: one of the accepting worker if it has any, else
//! one of the worker that has the most. A connection with a request is never closed.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::RwLock;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long a new connection waits for an idle one to close.
const WAIT: Duration = Duration::from_millis(250);

/// The limit that all workers share.
pub struct Room {
    places: Arc<Semaphore>,
    limit: AtomicUsize,
    /// Connections beyond a limit that was lowered: as many places do not become free again.
    excess: AtomicUsize,
    /// One per worker that has begun.
    workers_idle: RwLock<Vec<Arc<WorkerIdle>>>,
}

#[derive(Default)]
struct WorkerIdle {
    /// Number of idle connections.
    idle: AtomicUsize,
    /// Number of idle connections that other workers want closed.
    wanted: AtomicUsize,
    asked: Notify,
}

/// A connection's place; dropping it frees the place.
pub type Place = OwnedSemaphorePermit;

impl Room {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            places: Arc::new(Semaphore::new(limit)),
            limit: AtomicUsize::new(limit),
            excess: AtomicUsize::new(0),
            workers_idle: RwLock::default(),
        })
    }

    /// Changes the limit. Connections beyond it stay. Must not be called by two threads at once.
    pub fn set_limit(&self, limit: usize) {
        let before = self.limit.swap(limit, Relaxed);
        let more = limit.saturating_sub(before);
        let excess = self.excess.fetch_update(Relaxed, Relaxed, |excess| Some(excess.saturating_sub(more)));
        self.places.add_permits(more - excess.unwrap_or_else(|excess| excess).min(more));
        let fewer = before.saturating_sub(limit);
        self.excess.fetch_add(fewer - self.places.forget_permits(fewer), Relaxed);
    }

    /// The connection count for `/readyz?verbose`.
    pub fn describe(&self) -> String {
        let (free, limit) = (self.places.available_permits(), self.limit.load(Relaxed));
        let full = if free == 0 { ", full: new connections are refused unless an idle one can be closed" } else { "" };
        format!("connections: {} of {limit}{full}", (limit + self.excess.load(Relaxed)).saturating_sub(free))
    }

    pub fn try_enter(&self) -> Option<Place> {
        loop {
            let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
            if let Some(place) = self.within_limit(place) {
                return Some(place);
            }
        }
    }

    /// Waits for a free place. Cancel-safe.
    async fn entered(&self) -> Option<Place> {
        loop {
            let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
            if let Some(place) = self.within_limit(place) {
                return Some(place);
            }
        }
    }

    /// Removes the place if there are more than the limit.
    fn within_limit(&self, place: Place) -> Option<Place> {
        if self.excess.fetch_update(Relaxed, Relaxed, |excess| excess.checked_sub(1)).is_err() {
            return Some(place);
        }
        place.forget();
        None
    }
}

/// The idle connections of one worker.
pub struct Idle {
    room: Arc<Room>,
    own: Arc<WorkerIdle>,
    next: Cell<u64>,
    /// Longest idle first.
    connections: RefCell<BTreeMap<u64, Rc<Notify>>>,
}

impl Idle {
    pub fn new(room: Arc<Room>) -> Rc<Self> {
        let own = Arc::<WorkerIdle>::default();
        room.workers_idle.write().push(Arc::clone(&own));
        Rc::new(Self { room, own, next: Cell::new(0), connections: RefCell::default() })
    }

    pub fn room(&self) -> &Room {
        &self.room
    }

    /// Waits for a free place, closing an idle connection if needed; `None` if no connection is idle.
    pub async fn enter(&self) -> Option<Place> {
        if let Some(place) = self.room.try_enter() {
            return Some(place);
        }
        if !self.make_room() {
            return None;
        }
        timeout(WAIT, self.room.entered()).await.ok()?
    }

    /// Asks for one idle connection to be closed, which takes a moment. Returns false if no worker has one.
    pub fn make_room(&self) -> bool {
        if self.close_oldest() {
            return true;
        }
        let workers = self.room.workers_idle.read();
        let most =
            workers.iter().max_by_key(|worker| worker.idle.load(Relaxed).saturating_sub(worker.wanted.load(Relaxed)));
        let Some(worker) = most.filter(|worker| worker.idle.load(Relaxed) > worker.wanted.load(Relaxed)) else {
            return false;
        };
        worker.wanted.fetch_add(1, Relaxed);
        worker.asked.notify_one();
        true
    }

    fn close_oldest(&self) -> bool {
        let oldest = self.connections.borrow_mut().pop_first();
        let Some((_, close)) = oldest else { return false };
        self.own().idle.fetch_sub(1, Relaxed);
        close.notify_one();
        true
    }

    /// Closes idle connections at the request of other workers. Never returns.
    pub async fn serve_others(&self) {
        loop {
            self.own().asked.notified().await;
            for _ in 0..self.own().wanted.swap(0, Relaxed) {
                self.close_oldest();
            }
        }
    }

    fn own(&self) -> &WorkerIdle {
        &self.own
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.room.workers_idle.write().retain(|worker| !Arc::ptr_eq(worker, &self.own));
    }
}

/// A connection's idle state.
pub struct IdleState {
    idle: Rc<Idle>,
    closing: Rc<Notify>,
    /// Its key among the idle connections.
    number: Cell<Option<u64>>,
    /// The connection has had a request.
    used: Cell<bool>,
    is_shed: Cell<bool>,
}

impl IdleState {
    pub fn new(idle: &Rc<Idle>) -> Self {
        let closing = Rc::new(Notify::new());
        Self {
            idle: Rc::clone(idle),
            closing,
            number: Cell::new(None),
            used: Cell::new(false),
            is_shed: Cell::new(false),
        }
    }

    /// Marks the connection idle.
    pub fn set_idle(&self) {
        if self.number.get().is_none() {
            let number = self.idle.next.replace(self.idle.next.get() + 1);
            self.idle.connections.borrow_mut().insert(number, Rc::clone(&self.closing));
            self.idle.own().idle.fetch_add(1, Relaxed);
            self.number.set(Some(number));
        }
    }

    /// Marks the connection busy with a request.
    pub fn set_busy(&self) {
        self.used.set(true);
        if let Some(number) = self.number.take()
            && self.idle.connections.borrow_mut().remove(&number).is_some()
        {
            self.idle.own().idle.fetch_sub(1, Relaxed);
        }
    }

    pub fn is_used(&self) -> bool {
        self.used.get()
    }

    /// Marks the connection as shed.
    pub fn mark_shed(&self) {
        self.is_shed.set(true);
    }

    pub fn is_shed(&self) -> bool {
        self.is_shed.get()
    }

    /// Resolves when the connection has to close in favour of another one. Cancel-safe.
    pub async fn shed(&self) {
        self.closing.notified().await;
    }
}

impl Drop for IdleState {
    fn drop(&mut self) {
        self.set_busy();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn full_room_closes_the_longest_idle_connection() {
        let room = Room::new(2);
        let idle = Idle::new(Arc::clone(&room));
        let [one, two] = [IdleState::new(&idle), IdleState::new(&idle)];
        let places = [idle.enter().await.unwrap(), idle.enter().await.unwrap()];
        assert!(idle.enter().await.is_none(), "both connections have a request");
        one.set_idle();
        two.set_idle();
        one.set_busy();
        one.set_idle();
        let [first, second] = places;
        let (entered, ()) = tokio::join!(idle.enter(), async {
            two.shed().await;
            drop(second);
        });
        assert!(entered.is_some() && one.shed().now_or_never().is_none());
        drop((first, two));
        assert_eq!(room.describe(), "connections: 1 of 2");
    }

    #[tokio::test]
    async fn idle_connection_of_another_worker_is_closed() {
        let room = Room::new(1);
        let [here, there] = [(); 2].map(|()| Idle::new(Arc::clone(&room)));
        let other = IdleState::new(&there);
        let place = there.enter().await.unwrap();
        assert!(here.enter().await.is_none());
        assert!(room.describe().contains("1 of 1, full"), "{}", room.describe());
        other.set_idle();
        let closed = async {
            other.shed().await;
            drop((place, other));
        };
        let entered = tokio::select! {
            (entered, ()) = async { tokio::join!(here.enter(), closed) } => entered,
            () = there.serve_others() => None,
        };
        assert!(entered.is_some());
        assert!(here.enter().await.is_none());
    }

    #[tokio::test]
    async fn changed_limit_applies_to_connections_that_begin_later() {
        let room = Room::new(3);
        let mut places: Vec<_> = (0..3).map(|_| room.try_enter().unwrap()).collect();
        room.set_limit(1);
        assert_eq!(room.describe().split(',').next(), Some("connections: 3 of 1"));
        for _ in 0..2 {
            places.pop();
            assert!(room.try_enter().is_none());
        }
        assert!(room.describe().contains("1 of 1"), "{}", room.describe());
        places.pop();
        places.extend(room.try_enter());
        assert!(places.len() == 1 && room.try_enter().is_none());
        // Raised while connections are beyond the limit.
        room.set_limit(3);
        places.extend([room.try_enter().unwrap(), room.try_enter().unwrap()]);
        room.set_limit(0);
        room.set_limit(2);
        places.pop();
        assert!(room.try_enter().is_none());
        places.pop();
        assert!(room.try_enter().is_some());
        drop(places);
        let all: Vec<_> = std::iter::from_fn(|| room.try_enter()).collect();
        assert_eq!(all.len(), 2);
    }
}
