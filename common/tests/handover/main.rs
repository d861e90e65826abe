//! Checks the handover of a flow between agent and kernel in every order in which two processors may see each other's accesses,
//! with loom's model of C11 (which includes arm64).
//!
//! The rules are the files of the crate, compiled with loom's atomic as the word. The agent takes the same steps in the same order
//! as `deliver`, `steer` and `kernel/slots.rs` in `agent/src/`. Bytes that the kernel moves later than it decides are in
//! `tests/verdict`. Each rule is also checked with one order weakened, and the model must find the fault.
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

/// The model tries every order with up to this many preemptions. Three take a quarter of a minute and find nothing more.
const PREEMPTIONS: usize = 2;

/// The bytes for which the client's send queue has room.
const ROOMS: [[bool; BYTES]; 5] =
    [[true; BYTES], [true, true, false], [true, false, true], [false, true, true], [false; BYTES]];

/// A model of one rule with an agent. Takes the room, the weakened order, and the counters of what happened.
type Model = fn([bool; BYTES], Option<Weakened>, &Arc<Seen>);

fn explore(model: Model, room: [bool; BYTES], weakened: Option<Weakened>, seen: &Arc<Seen>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    let seen = Arc::clone(seen);
    builder.check(move || model(room, weakened, &seen));
}

/// The rule holds in every order, and every case occurs.
fn holds(model: Model) {
    let seen = Arc::default();
    for room in ROOMS {
        explore(model, room, None, &seen);
    }
    println!("{seen:?}");
    assert!(seen.all(), "{seen:?}");
}

/// With one order weakened, the model finds the fault `what`.
fn finds(model: Model, weakened: Weakened, what: &str) {
    let explored = catch_unwind(AssertUnwindSafe(|| explore(model, [true; BYTES], Some(weakened), &Arc::default())));
    let Err(found) = explored else { panic!("{weakened:?} is not needed") };
    let text = found.downcast_ref::<String>().map(String::as_str).or(found.downcast_ref::<&str>().copied());
    assert!(text.is_some_and(|text| text.contains(what)), "{weakened:?}: {text:?}");
}

/// Two unordered accesses to the same fields.
const RACE: &str = "Causality violation";
const DEADLOCK: &str = "deadlock";
const OVERTAKEN: &str = "every byte once, in order";

macro_rules! rules {
    ($($rule:ident = $model:path { $($name:ident: $weakened:ident, $what:ident;)+ })+) => {
        $(mod $rule {
            use super::*;

            #[test]
            fn every_byte_arrives_once_and_in_order() {
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
    verdict_rule = ingress::run {
        release_of_arming_is_needed: Arming, RACE;
        acquire_of_armed_is_needed: Armed, RACE;
        release_of_clearing_is_needed: Clearing, RACE;
        acquire_of_reclaiming_is_needed: Reclaiming, RACE;
        counting_before_clearing_is_needed: ClearedFirst, RACE;
        read_after_arming_is_needed: ReadFirst, DEADLOCK;
        arming_at_the_read_position_is_needed: ArmedAhead, OVERTAKEN;
    }
    message_rule = sender::run {
        release_of_arming_is_needed: Arming, RACE;
        acquire_of_armed_is_needed: Armed, RACE;
        release_of_clearing_is_needed: Clearing, RACE;
        acquire_of_reclaiming_is_needed: Reclaiming, RACE;
        counting_before_clearing_is_needed: ClearedFirst, RACE;
        arming_at_the_read_position_is_needed: ArmedAhead, RACE;
    }
}
