//! The model of path `ingress`: verdicts under the lock of the agent's socket, and the agent.

use std::sync::{Arc, atomic::Ordering::Acquire};

use crate::{
    framing::Framing,
    scene::{BYTES, Program, Scene, Seen, Weakened, span},
    slot::{Slot, Word},
    verdict::{Segment, verdict},
};

pub(crate) fn run(room: [bool; BYTES], weakened: Option<Weakened>, seen: &Arc<Seen>) {
    let slot =
        Slot { span: span(), passed: Word::default(), wbase: 0, origin: 0, astray: Word::default(), reserved: [0; 2] };
    let scene = Arc::new(Scene::new(slot, room, weakened, seen));
    let kernel = Arc::clone(&scene);
    let endpoint = loom::thread::spawn(move || {
        for byte in 0..BYTES as u8 {
            arrive(&kernel, byte);
        }
    });
    agent(&scene);
    endpoint.join().unwrap();
    scene.check();
}

/// A segment of one byte arrives.
fn arrive(scene: &Scene<Slot>, byte: u8) {
    let mut socket = scene.socket.lock().unwrap();
    // SAFETY: the lock serialises verdicts, and the agent's accesses are what the model checks.
    let slot = unsafe { &mut *scene.slot() };
    let mut program = Program::new(scene, &raw const slot.span, byte, 0);
    verdict(slot, 1, &mut program);
    if program.end() {
        scene.client.lock().unwrap().push(byte);
    } else {
        socket.push(byte);
    }
}

impl Segment for Program<'_, Slot> {
    fn sequence(&mut self) -> u32 {
        u32::from(self.byte)
    }

    fn trim(&mut self, _: u32) -> bool {
        false
    }

    fn closed(&mut self) -> bool {
        false
    }

    fn is_shared(&mut self) -> bool {
        false
    }
}

/// The agent's delivery: writes what user space holds, and arms whenever it holds nothing.
fn agent(scene: &Scene<Slot>) {
    let slot = scene.slot();
    // SAFETY: a field's address.
    let span = unsafe { &raw mut (*slot).span };
    let (mut framing, mut consumed) = (Framing::length(BYTES as u64), 0);
    while !framing.is_done() {
        // `armable`
        if passed(slot) != consumed {
            let pending = scene.read_now();
            assert!(!pending.is_empty(), "a passed byte is missing");
            consumed += pending.len() as u64;
            scene.forward(&mut framing, &pending);
            continue;
        }
        // `span`
        let early = if scene.is(Weakened::ReadFirst) { scene.read_now() } else { Vec::new() };
        scene.plain();
        // SAFETY: the slot is released, so this field is the agent's; the model reports a race if not.
        unsafe { (*slot).wbase = 0 };
        scene.arm(span, framing, consumed + 1);
        let pending = if scene.is(Weakened::ReadFirst) { early } else { scene.read_after_arming() };
        if pending.is_empty() && !scene.is_released(span) && (scene.is(Weakened::ReadFirst) || passed(slot) == consumed)
        {
            while !scene.is_released(span) {
                scene.sleep();
            }
        }
        if !scene.is_released(span) {
            scene.disarm(span);
            // `wait_for_verdict`
            drop(scene.socket.lock().unwrap());
        }
        framing = scene.framing(span);
        consumed += pending.len() as u64;
        scene.forward(&mut framing, &pending);
    }
}

/// Bytes passed to user space.
fn passed(slot: *const Slot) -> u64 {
    // SAFETY: a word.
    unsafe { &(*slot).passed }.atomic().load(Acquire)
}
