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

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long a new connection waits for an idle one to close.
const WAIT: Duration = Duration::from_millis(250);

/// The limit that all workers share.
pub struct Room {
    places: Arc<Semaphore>,
    limit: usize,
    /// One per worker.
    corners: Vec<Corner>,
}

#[derive(Default)]
struct Corner {
    /// Number of idle connections.
    idle: AtomicUsize,
    /// Number of idle connections that other workers want closed.
    wanted: AtomicUsize,
    asked: Notify,
}

/// A connection's place; dropping it frees the place.
pub type Place = OwnedSemaphorePermit;

impl Room {
    pub fn new(limit: usize, workers: usize) -> Arc<Self> {
        let corners = (0..workers).map(|_| Corner::default()).collect();
        Arc::new(Self { places: Arc::new(Semaphore::new(limit)), limit, corners })
    }

    /// The connection count for `/readyz?verbose`.
    pub fn describe(&self) -> String {
        let free = self.places.available_permits();
        let full = if free == 0 { ", full: new connections are refused unless an idle one can be closed" } else { "" };
        format!("connections: {} of {}{full}", self.limit - free, self.limit)
    }

    pub fn try_enter(&self) -> Option<Place> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }
}

/// The idle connections of one worker.
pub struct Idle {
    room: Arc<Room>,
    worker: usize,
    next: Cell<u64>,
    /// Longest idle first.
    resting: RefCell<BTreeMap<u64, Rc<Notify>>>,
}

impl Idle {
    pub fn new(room: Arc<Room>, worker: usize) -> Rc<Self> {
        Rc::new(Self { room, worker, next: Cell::new(0), resting: RefCell::default() })
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
        timeout(WAIT, Arc::clone(&self.room.places).acquire_owned()).await.ok()?.ok()
    }

    /// Asks for one idle connection to be closed, which takes a moment. Returns false if no worker has one.
    pub fn make_room(&self) -> bool {
        if self.close_oldest() {
            return true;
        }
        let corners = self.room.corners.iter();
        let most = corners.max_by_key(|corner| corner.idle.load(Relaxed).saturating_sub(corner.wanted.load(Relaxed)));
        let Some(corner) = most.filter(|corner| corner.idle.load(Relaxed) > corner.wanted.load(Relaxed)) else {
            return false;
        };
        corner.wanted.fetch_add(1, Relaxed);
        corner.asked.notify_one();
        true
    }

    fn close_oldest(&self) -> bool {
        let oldest = self.resting.borrow_mut().pop_first();
        let Some((_, close)) = oldest else { return false };
        self.corner().idle.fetch_sub(1, Relaxed);
        close.notify_one();
        true
    }

    /// Closes idle connections at the request of other workers. Never returns.
    pub async fn serve_others(&self) {
        loop {
            self.corner().asked.notified().await;
            for _ in 0..self.corner().wanted.swap(0, Relaxed) {
                self.close_oldest();
            }
        }
    }

    fn corner(&self) -> &Corner {
        &self.room.corners[self.worker]
    }
}

/// A connection's idle state.
pub struct Resting {
    idle: Rc<Idle>,
    close: Rc<Notify>,
    /// Its key among the idle connections.
    number: Cell<Option<u64>>,
    /// The connection has had a request.
    used: Cell<bool>,
    over: Cell<bool>,
}

impl Resting {
    pub fn new(idle: &Rc<Idle>) -> Self {
        let close = Rc::new(Notify::new());
        Self { idle: Rc::clone(idle), close, number: Cell::new(None), used: Cell::new(false), over: Cell::new(false) }
    }

    /// Marks the connection idle.
    pub fn begin(&self) {
        if self.number.get().is_none() {
            let number = self.idle.next.replace(self.idle.next.get() + 1);
            self.idle.resting.borrow_mut().insert(number, Rc::clone(&self.close));
            self.idle.corner().idle.fetch_add(1, Relaxed);
            self.number.set(Some(number));
        }
    }

    /// Marks the connection busy with a request.
    pub fn end(&self) {
        self.used.set(true);
        if let Some(number) = self.number.take()
            && self.idle.resting.borrow_mut().remove(&number).is_some()
        {
            self.idle.corner().idle.fetch_sub(1, Relaxed);
        }
    }

    pub fn is_used(&self) -> bool {
        self.used.get()
    }

    /// Marks the connection as shed.
    pub fn give_up(&self) {
        self.over.set(true);
    }

    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Resolves when the connection has to close in favour of another one. Cancel-safe.
    pub async fn closed(&self) {
        self.close.notified().await;
    }
}

impl Drop for Resting {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn full_room_closes_the_longest_idle_connection() {
        let room = Room::new(2, 1);
        let idle = Idle::new(Arc::clone(&room), 0);
        let [one, two] = [Resting::new(&idle), Resting::new(&idle)];
        let places = [idle.enter().await.unwrap(), idle.enter().await.unwrap()];
        assert!(idle.enter().await.is_none(), "both connections have a request");
        one.begin();
        two.begin();
        one.end();
        one.begin();
        let [first, second] = places;
        let (entered, ()) = tokio::join!(idle.enter(), async {
            two.closed().await;
            drop(second);
        });
        assert!(entered.is_some() && one.closed().now_or_never().is_none());
        drop((first, two));
        assert_eq!(room.describe(), "connections: 1 of 2");
    }

    #[tokio::test]
    async fn idle_connection_of_another_worker_is_closed() {
        let room = Room::new(1, 2);
        let [here, there] = [0, 1].map(|worker| Idle::new(Arc::clone(&room), worker));
        let other = Resting::new(&there);
        let place = there.enter().await.unwrap();
        assert!(here.enter().await.is_none());
        assert!(room.describe().contains("1 of 1, full"), "{}", room.describe());
        other.begin();
        let closed = async {
            other.closed().await;
            drop((place, other));
        };
        let entered = tokio::select! {
            (entered, ()) = async { tokio::join!(here.enter(), closed) } => entered,
            () = there.serve_others() => None,
        };
        assert!(entered.is_some());
        assert!(here.enter().await.is_none());
    }
}
