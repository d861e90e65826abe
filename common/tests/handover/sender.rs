//! The model of path `local`: the endpoint's `sendmsg` with its program, and the agent, which shares no lock with them.

use std::sync::Arc;

use crate::{
    framing::Framing,
    local::{Message, message},
    scene::{BYTES, Program, Scene, Seen, Weakened, span},
    slot::{LocalSlot, Word},
};

pub(crate) fn run(room: [bool; BYTES], weakened: Option<Weakened>, seen: &Arc<Seen>) {
    let (origin, peer, found) = (Word::default(), Word::default(), Word::default());
    let slot = LocalSlot { span: span(), expected: 0, origin, peer, found, reserved: [0; 2] };
    let scene = Arc::new(Scene::new(slot, room, weakened, seen));
    let kernel = Arc::clone(&scene);
    let endpoint = loom::thread::spawn(move || {
        let mut write_seq = 0;
        for byte in 0..BYTES as u8 {
            send(&kernel, byte, &mut write_seq);
        }
    });
    agent(&scene);
    endpoint.join().unwrap();
    scene.check();
}

/// The endpoint sends one byte. The program decides under the socket's lock; the transfer follows without it
/// (`tcp_bpf_send_verdict`).
fn send(scene: &Scene<LocalSlot>, byte: u8, write_seq: &mut u32) {
    // SAFETY: one endpoint, and the agent's accesses are what the model checks.
    let slot = unsafe { &mut *scene.slot() };
    let mut program = Program::new(scene, &raw const slot.span, byte, *write_seq);
    message(slot, 1, &mut program);
    if program.end() {
        scene.client.lock().unwrap().push(byte);
        scene.moved.notify();
    } else {
        *write_seq += 1;
        scene.socket.lock().unwrap().push(byte);
        // The agent's socket has become readable.
        scene.event.notify();
    }
}

impl Message for Program<'_, LocalSlot> {
    fn write_seq(&mut self) -> u32 {
        self.write_seq
    }

    fn keeps_account(&mut self) -> bool {
        false
    }
}

/// The agent's delivery.
fn agent(scene: &Scene<LocalSlot>) {
    let slot = scene.slot();
    // SAFETY: a field's address.
    let span = unsafe { &raw mut (*slot).span };
    let (mut framing, mut consumed, mut account) = (Framing::length(BYTES as u64), 0, 0);
    while !framing.is_done() {
        // `span`
        let before = scene.redirected(span);
        scene.plain();
        // SAFETY: the slot is released, so this field is the agent's; the model reports a race if not.
        unsafe { (*slot).expected = 0 };
        scene.arm(span, framing, 1 << 32 | consumed);
        let pending = listen(scene, span);
        if !scene.is_released(span) {
            scene.disarm(span);
            // `wait_for_verdict`: waits for the agent's own socket, not for the endpoint's.
            drop(scene.socket.lock().unwrap());
        }
        // Reclaims.
        account += scene.redirected(span) - before;
        framing = scene.framing(span);
        while (scene.client.lock().unwrap().len() as u64) < account {
            scene.moved.wait();
        }
        account += pending.len() as u64;
        consumed += pending.len() as u64;
        scene.forward(&mut framing, &pending);
    }
}

/// Bytes that were sent over the connection; none if the kernel disarms first.
fn listen(scene: &Scene<LocalSlot>, span: *const crate::slot::Span) -> Vec<u8> {
    loop {
        let pending = scene.read_after_arming();
        if !pending.is_empty() || scene.is_released(span) {
            return pending;
        }
        scene.sleep();
    }
}
