//! Limits the concurrent connections to the admin port, in two classes: those waiting for their request and those being
//! answered.
//!
//! A connection that enters a full class sheds the oldest connection of the address that has the most in that class. So
//! idle connections cannot displace answers, slow readers cannot displace requests, and no address can displace one
//! that has fewer.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    rc::Rc,
};

use tokio::sync::Notify;

pub(super) struct Places {
    /// Maximum number of connections per class.
    bound: usize,
    next: Cell<u64>,
    waiting: RefCell<Class>,
    answering: RefCell<Class>,
}

/// By age, oldest first.
type Class = BTreeMap<u64, HeldPlace>;

struct HeldPlace {
    address: IpAddr,
    shed: Rc<Notify>,
}

/// A connection's place in a class; dropping it frees the place.
pub(super) struct AdminPlace {
    number: u64,
    shed: Rc<Notify>,
    places: Rc<Places>,
}

impl Places {
    pub(super) fn new(bound: usize) -> Self {
        Self { bound, next: Cell::new(0), waiting: RefCell::default(), answering: RefCell::default() }
    }

    /// Registers a connection from `address` that has sent nothing yet.
    pub(super) fn enter(places: &Rc<Self>, address: IpAddr) -> AdminPlace {
        let number = places.next.replace(places.next.get() + 1);
        let shed = Rc::new(Notify::new());
        places.insert(&places.waiting, number, HeldPlace { address, shed: Rc::clone(&shed) });
        AdminPlace { number, shed, places: Rc::clone(places) }
    }

    /// Sheds one connection, if there is one; waiting connections first.
    pub(super) fn shed(&self) {
        for class in [&self.waiting, &self.answering] {
            if shed_oldest(&mut class.borrow_mut()) {
                return;
            }
        }
    }

    fn insert(&self, class: &RefCell<Class>, number: u64, held: HeldPlace) {
        let mut class = class.borrow_mut();
        if class.len() >= self.bound {
            shed_oldest(&mut class);
        }
        class.insert(number, held);
    }
}

/// Returns false if the class is empty.
fn shed_oldest(class: &mut Class) -> bool {
    let mut by_address: HashMap<IpAddr, usize> = HashMap::new();
    for held in class.values() {
        *by_address.entry(held.address).or_default() += 1;
    }
    let most = by_address.values().max().copied();
    let oldest = class.iter().find(|(_, held)| by_address.get(&held.address).copied() == most);
    let Some((&number, _)) = oldest else { return false };
    if let Some(held) = class.remove(&number) {
        held.shed.notify_one();
    }
    true
}

impl AdminPlace {
    /// Moves the connection to the answering class, because its request has arrived.
    pub(super) fn answering(&self) {
        let held = self.places.waiting.borrow_mut().remove(&self.number);
        if let Some(held) = held {
            self.places.insert(&self.places.answering, self.number, held);
        }
    }

    /// Resolves when the connection has to close because another one takes its place.
    pub(super) async fn shed(&self) {
        self.shed.notified().await;
    }
}

impl Drop for AdminPlace {
    fn drop(&mut self) {
        self.places.waiting.borrow_mut().remove(&self.number);
        self.places.answering.borrow_mut().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_shed(place: &AdminPlace) -> bool {
        place.shed().now_or_never().is_some()
    }

    #[test]
    fn full_class_sheds_the_oldest_of_the_address_that_has_the_most() {
        let places = Rc::new(Places::new(3));
        let probe = Places::enter(&places, address(1));
        let flood: Vec<AdminPlace> = (0..10).map(|_| Places::enter(&places, address(2))).collect();
        assert!(!is_shed(&probe));
        assert_eq!(flood.iter().map(is_shed).collect::<Vec<_>>(), [[true; 8].as_slice(), &[false; 2]].concat());
    }

    #[test]
    fn waiting_connections_do_not_displace_answers() {
        let places = Rc::new(Places::new(2));
        let answers: Vec<AdminPlace> = (0..2).map(|_| Places::enter(&places, address(1))).collect();
        answers.iter().for_each(AdminPlace::answering);
        let waiting: Vec<AdminPlace> = (0..10).map(|_| Places::enter(&places, address(1))).collect();
        assert!(!answers.iter().any(is_shed) && !is_shed(&waiting[9]));
        // A third answer displaces the first.
        waiting[9].answering();
        assert!(is_shed(&answers[0]) && !is_shed(&answers[1]) && !is_shed(&waiting[9]));
        // If descriptors run out, waiting connections are shed first.
        let last = Places::enter(&places, address(9));
        places.shed();
        assert!(is_shed(&waiting[8]) && !is_shed(&last));
    }
}
