//! The handover of a flow between agent and kernel, in every order in which two processors may see each other's accesses, those
//! of arm64 included (loom's model of C11).
//!
//! The rules are the files of the crate, compiled here with loom's atomic in place of the word; the agent takes the steps of
//! `agent/src/deliver/span.rs` and `agent/src/kernel/slots.rs` in their order. What the kernel moves later than it decides is
//! `tests/verdict.rs`' to play. Each rule is checked as it is, and with one order weakened, which the model must find: a check
//! that cannot fail shows nothing.
#![allow(unsafe_code)] // the slot is memory that two programs write

#[path = "../../src/framing.rs"]
#[allow(dead_code, unreachable_pub)]
mod framing;
#[path = "../../src/local.rs"]
#[allow(unreachable_pub)]
mod local;
#[path = "../../src/slot.rs"]
#[allow(dead_code, unreachable_pub)]
mod slot;
#[path = "../../src/verdict.rs"]
#[allow(dead_code, unreachable_pub)]
mod verdict;
#[allow(unreachable_pub)]
mod word;

mod ingress;
mod scene;
mod sender;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use scene::{BYTES, Seen, Weakened};

/// Every order is tried that takes up to this many preemptions. (Three take a quarter of a minute, and find nothing more.)
const PREEMPTIONS: usize = 2;

/// For which bytes the client's send queue has room.
const ROOMS: [[bool; BYTES]; 5] =
    [[true; BYTES], [true, true, false], [true, false, true], [false, true, true], [false; BYTES]];

/// One of the rules with an agent: given the room, what is weakened, and what has been seen.
type Model = fn([bool; BYTES], Option<Weakened>, &Arc<Seen>);

fn explore(model: Model, room: [bool; BYTES], weakened: Option<Weakened>, seen: &Arc<Seen>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    let seen = Arc::clone(seen);
    builder.check(move || model(room, weakened, &seen));
}

/// As it is, the rule holds, in every order; and there is something to hold.
fn holds(model: Model) {
    let seen = Arc::default();
    for room in ROOMS {
        explore(model, room, None, &seen);
    }
    println!("{seen:?}");
    assert!(seen.all(), "{seen:?}");
}

/// With one order weakened, the model finds this.
fn finds(model: Model, weakened: Weakened, what: &str) {
    let explored = catch_unwind(AssertUnwindSafe(|| explore(model, [true; BYTES], Some(weakened), &Arc::default())));
    let Err(found) = explored else { panic!("{weakened:?} makes no difference") };
    let text = found.downcast_ref::<String>().map(String::as_str).or(found.downcast_ref::<&str>().copied());
    assert!(text.is_some_and(|text| text.contains(what)), "{weakened:?}: {text:?}");
}

/// Two accesses to the same fields that nothing orders.
const RACE: &str = "Causality violation";
const DEADLOCK: &str = "deadlock";
const OVERTAKEN: &str = "every byte once, in order";

macro_rules! rules {
    ($($rule:ident = $model:path { $($name:ident: $weakened:ident, $what:ident;)+ })+) => {
        $(mod $rule {
            use super::*;

            #[test]
            fn loses_nothing_and_lets_nothing_overtake() {
                holds($model);
            }

            $(#[test]
            fn $name() {
                finds($model, Weakened::$weakened, $what);
            })+
        })+
    };
}

rules! {
    the_verdict_on_a_segment = ingress::run {
        needs_the_release_of_arming: Arming, RACE;
        needs_the_acquire_behind_it: Armed, RACE;
        needs_the_release_of_clearing: Clearing, RACE;
        needs_the_acquire_of_taking_back: TakingBack, RACE;
        needs_its_books_before_the_clearing: ClearedFirst, RACE;
        needs_the_read_behind_the_arming: ReadFirst, DEADLOCK;
        needs_to_know_what_was_read: ArmedAhead, OVERTAKEN;
    }
    the_rule_for_a_message = sender::run {
        needs_the_release_of_arming: Arming, RACE;
        needs_the_acquire_behind_it: Armed, RACE;
        needs_the_release_of_clearing: Clearing, RACE;
        needs_the_acquire_of_taking_back: TakingBack, RACE;
        needs_its_books_before_the_clearing: ClearedFirst, RACE;
        needs_to_know_what_was_read: ArmedAhead, RACE;
    }
}
