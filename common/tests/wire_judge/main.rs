//! The rule of path `wire`: when a flow begins, which packets pass, and when it ends.

mod ring;
mod scene;

use penstock_common::wire::{
    flow::{CLIENT, ENDPOINT, Ends, mark, state},
    header::{ACK, FIN, RST, SYN, Shift},
    judge::{Leaving, OwnPacket, Packet, Verdict, arrive, refusal},
    quoted::{Quoted, as_sent},
};
use proptest::prelude::*;

use self::scene::{NUMBERS, Numbers, Scene};

#[test]
fn each_refusal_leaves_the_packet_to_the_relay() {
    type Change = fn(&mut Scene, &mut Packet);
    let rows: [(u64, Change); 13] = [
        (refusal::UNSEEN, |scene, _| scene.flow.legs[CLIENT].arrives_on.set(0)),
        (refusal::UNSEEN, |scene, _| scene.flow.legs[CLIENT].leaves_on.set(0)),
        (refusal::UNSEEN, |scene, _| scene.flow.legs[ENDPOINT].leaves_on.set(0)),
        (refusal::NOT_NEXT, |_, packet| packet.seq += 1),
        (refusal::NOT_NEXT, |_, packet| packet.seq -= 1),
        (refusal::UNREAD, |scene, _| scene.kernel.sockets[ENDPOINT].as_mut().unwrap().received += 1),
        (refusal::UNREAD, |scene, _| scene.kernel.sockets[CLIENT].as_mut().unwrap().received += 1),
        (refusal::UNACKNOWLEDGED, |scene, _| scene.kernel.sockets[CLIENT].as_mut().unwrap().snd_nxt += 1),
        (refusal::UNACKNOWLEDGED, |scene, _| scene.kernel.sockets[CLIENT].as_mut().unwrap().acked -= 1),
        (refusal::UNACKNOWLEDGED, |scene, _| scene.kernel.sockets[ENDPOINT].as_mut().unwrap().acked += 1),
        (refusal::OPTIONS, |_, packet| packet.timestamped = 0),
        (refusal::LARGE, |_, packet| packet.largest = 1449),
        (refusal::SOCKET, |scene, _| scene.kernel.sockets[CLIENT] = None),
    ];
    for (row, (expected, change)) in rows.into_iter().enumerate() {
        let mut scene = Scene::armed(NUMBERS);
        let mut packet = scene.data(0, 10);
        change(&mut scene, &mut packet);
        let word = scene.flow.state.get();
        assert_eq!(scene.endpoint_sends(packet), Verdict::Pass, "row {row}");
        assert_eq!((scene.flow.refusal.get(), scene.flow.state.get()), (expected, word), "row {row}");
        assert_eq!(scene.kernel.events, 0, "row {row}");
    }
}

#[test]
fn only_payload_of_the_endpoint_begins_a_flow() {
    for flags in [FIN | ACK, RST | ACK, SYN | ACK] {
        let mut scene = Scene::armed(NUMBERS);
        let packet = Packet { flags, ..scene.data(0, 10) };
        assert_eq!((scene.endpoint_sends(packet), scene.state()), (Verdict::Pass, state::ARMED));
    }
    let mut scene = Scene::armed(NUMBERS);
    assert_eq!((scene.endpoint_sends(scene.data(0, 0)), scene.state()), (Verdict::Pass, state::ARMED));
    assert_eq!(
        (scene.client_sends(Packet { payload: 9, ..scene.ack(0, 0) }), scene.state()),
        (Verdict::Pass, state::ARMED)
    );
    // A segment beyond a gap waits in the agent's socket: the one before it must not begin the flow.
    let mut scene = Scene::armed(NUMBERS);
    assert_eq!(scene.endpoint_sends(scene.data(10, 10)), Verdict::Pass);
    assert_eq!((scene.endpoint_sends(scene.data(0, 10)), scene.flow.refusal.get()), (Verdict::Pass, refusal::NOT_NEXT));
}

#[test]
fn beginning_on_another_cpu_drops_packets() {
    let mut scene = Scene::armed(NUMBERS);
    scene.flow.state.set(1 << 8 | state::BEGINNING);
    assert_eq!(scene.endpoint_sends(scene.data(0, 10)), Verdict::Drop);
    assert_eq!(scene.client_sends(scene.ack(0, 0)), Verdict::Drop);
    assert_eq!((scene.leave(CLIENT, 1, ACK), scene.leave(CLIENT, 3, ACK)), (Leaving::Drop, Leaving::Pass));
}

#[test]
fn differences_of_the_two_connections() {
    let scene = Scene::begun(NUMBERS);
    let [client, endpoint] = &scene.flow.legs;
    // 500 ms, each clock's offset, and the margin, minus the peer's value.
    let (to_endpoint, to_client) = (500 + 77 + 2 - 123, 500 + 10 + 2 - 123);
    let seq = 7000u32.wrapping_sub(1000);
    let back = 2000u32.wrapping_sub(5000);
    assert_eq!(
        client.shift(),
        Shift {
            seq,
            ack: back.wrapping_neg(),
            tsval: to_endpoint,
            tsecr: 0u32.wrapping_sub(to_client),
            scale_in: 7,
            scale_out: 9
        }
    );
    assert_eq!(
        endpoint.shift(),
        Shift {
            seq: back,
            ack: seq.wrapping_neg(),
            tsval: to_client,
            tsecr: 0u32.wrapping_sub(to_endpoint),
            scale_in: 2,
            scale_out: 3
        }
    );
}

#[test]
fn payload_is_counted_once() {
    let mut scene = Scene::begun(NUMBERS);
    for (at, payload) in [(10, 20), (10, 20), (20, 15), (50, 5), (35, 15)] {
        let packet = scene.data(at, payload);
        assert_eq!(scene.endpoint_sends(packet), Verdict::Forward);
    }
    let endpoint = &scene.flow.legs[ENDPOINT];
    // 10 to begin with, 20, 5 new of 15, and 20 with the gap, which the last one fills.
    assert_eq!((endpoint.bytes.get(), endpoint.segments.get(), endpoint.packets.get()), (55, 4, 6));
    // Outside of the window, which the client has not opened that far.
    let far = scene.data(1000 << 7, 10);
    assert_eq!(scene.endpoint_sends(far), Verdict::Forward);
    assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), 55);
}

#[test]
fn payload_is_counted_once_by_programs_on_several_cpus() {
    let mut scene = Scene::begun(NUMBERS);
    let known = |at: u32| Some(1 << 32 | u64::from(NUMBERS.endpoint + at));
    // Another CPU has passed bytes 10 to 30 while this one looks at 20 to 50, and then at bytes that both have.
    scene.kernel.meanwhile = vec![known(30)];
    assert_eq!(scene.endpoint_sends(scene.data(20, 30)), Verdict::Forward);
    assert_eq!((scene.flow.legs[ENDPOINT].bytes.get(), scene.flow.legs[ENDPOINT].segments.get()), (30, 2));
    scene.kernel.meanwhile = vec![known(90)];
    assert_eq!(scene.endpoint_sends(scene.data(50, 40)), Verdict::Forward);
    assert_eq!((scene.flow.legs[ENDPOINT].bytes.get(), scene.flow.legs[ENDPOINT].segments.get()), (30, 2));
}

#[test]
fn flow_ends_after_both_fins_are_acknowledged() {
    let mut scene = Scene::begun(NUMBERS);
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    let fin = Packet { flags: FIN | ACK, ..scene.data(10, 5) };
    scene.endpoint_sends(fin);
    scene.client_sends(scene.ack(0, 15));
    assert_eq!(scene.flow.legs[ENDPOINT].closed.get(), 0, "the FIN is not acknowledged yet");
    scene.client_sends(Scene::packet(client, to_client + 16, FIN | ACK, 0));
    assert_eq!((scene.flow.legs[ENDPOINT].closed.get(), scene.state()), (1, state::ACTIVE));
    scene.endpoint_sends(Scene::packet(endpoint + 16, to_endpoint + 1, ACK, 0));
    assert_eq!((scene.state(), scene.kernel.events, scene.flow.marks.get()), (state::ENDED, 3, 0));
    // Late repetitions still pass, and silence lasts.
    assert_eq!(scene.endpoint_sends(fin), Verdict::Forward);
    assert_eq!(scene.leave(ENDPOINT, 2, FIN | ACK), Leaving::Drop);
    assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), 15);
}

#[test]
fn acknowledgements_of_a_client_that_has_closed_count() {
    let mut scene = Scene::begun(NUMBERS);
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    scene.client_sends(Scene::packet(client, to_client + 10, FIN | ACK, 0));
    scene.endpoint_sends(Scene::packet(endpoint + 10, to_endpoint + 1, FIN | ACK, 5));
    assert_eq!(scene.state(), state::ACTIVE);
    assert_eq!(scene.flow.marks.get(), mark::CLIENT_CLOSED_FIRST);
    let last = Scene::packet(client + 1, to_client + 16, ACK, 0);
    assert_eq!(scene.client_sends(last), Verdict::Forward);
    assert_eq!(scene.state(), state::ENDED);
}

/// Whatever order the last packets of two peers that close at the same time arrive in, the flow ends.
#[test]
fn overtaken_fins_end_the_flow() {
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    let from_client =
        [Scene::packet(client, to_client + 10, FIN | ACK, 0), Scene::packet(client + 1, to_client + 11, ACK, 0)];
    let from_endpoint = [
        Scene::packet(endpoint + 10, to_endpoint, FIN | ACK, 0),
        Scene::packet(endpoint + 11, to_endpoint + 1, ACK, 0),
    ];
    // An acknowledgement (in lower case) comes after the other peer's FIN, and may overtake the FIN of its own sender.
    for order in ["ECec", "ECce", "EcCe", "CEec", "CEce", "CeEc"] {
        let mut scene = Scene::begun(NUMBERS);
        for one in order.chars() {
            let verdict = match one {
                'C' => scene.client_sends(from_client[0]),
                'c' => scene.client_sends(from_client[1]),
                'E' => scene.endpoint_sends(from_endpoint[0]),
                _ => scene.endpoint_sends(from_endpoint[1]),
            };
            assert_eq!(verdict, Verdict::Forward);
        }
        assert_eq!(scene.state(), state::ENDED, "{order}");
    }
}

#[test]
fn forged_ends_change_nothing() {
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    let mut scene = Scene::armed(NUMBERS);
    // The agent has offered much to both.
    for leg in [CLIENT, ENDPOINT] {
        let packet = OwnPacket { window: u16::MAX, ..scene.own_ack(leg) };
        assert_eq!(scene.leaves(leg, &packet), Leaving::Pass);
    }
    scene.endpoint_sends(scene.data(0, 10));
    for packet in [
        Scene::packet(endpoint + 11, to_endpoint, RST, 0),
        Scene::packet(endpoint + 9, to_endpoint, RST | ACK, 0),
        Scene::packet(endpoint.wrapping_sub(1 << 30), to_endpoint, FIN | ACK, 0),
        Scene::packet(endpoint, to_endpoint, SYN, 0),
    ] {
        assert_eq!(scene.endpoint_sends(packet), Verdict::Forward);
        assert_eq!(scene.state(), state::ACTIVE);
    }
    let reset = Scene::packet(client.wrapping_sub(7), to_client, RST, 0);
    assert_eq!(scene.client_sends(reset), Verdict::Forward);
    // A FIN before bytes that have passed; its sender goes on.
    let forged = Scene::packet(client.wrapping_sub(7), to_client, FIN | ACK, 0);
    assert_eq!(scene.client_sends(forged), Verdict::Forward);
    assert_eq!((scene.flow.legs[CLIENT].fin.get(), scene.flow.marks.get()), (0, 0));
    // An acknowledgement of what was never sent does not move the window.
    scene.client_sends(scene.ack(0, 1 << 20));
    assert_eq!((scene.state(), scene.flow.legs[CLIENT].told.get() as u32), (state::ACTIVE, to_client));
    // Payload beyond the endpoint's window is not the client's.
    for flags in [ACK, FIN | ACK, RST] {
        let far = Scene::packet(client + (1000 << 2) + 1, to_client, flags, 5);
        assert_eq!((scene.client_sends(far), scene.flow.marks.get()), (Verdict::Drop, 0));
    }
    // A FIN after a gap, and a reset with its number.
    for flags in [FIN | ACK, RST] {
        scene.endpoint_sends(Scene::packet(endpoint + 500, to_endpoint, flags, 0));
    }
    assert_eq!(scene.state(), state::ACTIVE);
}

#[test]
fn reset_with_the_next_number_ends_the_flow() {
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    for (from, seq, ack, by) in
        [(CLIENT, client, to_client, mark::CLIENT_RESET), (ENDPOINT, endpoint + 10, to_endpoint, mark::ENDPOINT_RESET)]
    {
        let mut scene = Scene::begun(NUMBERS);
        let reset = Scene::packet(seq, ack, RST, 0);
        assert_eq!(arrive(&scene.flow, from, &reset, &mut scene.kernel), Verdict::Forward);
        assert_eq!((scene.state(), scene.flow.marks.get(), scene.kernel.events), (state::ENDED, by, 2));
    }
}

#[test]
fn reset_for_bytes_that_crossed_with_a_fin_ends_the_flow() {
    let Numbers { client, to_client, to_endpoint, .. } = NUMBERS;
    let mut scene = Scene::begun(NUMBERS);
    let fin = Packet { flags: FIN | ACK, ..scene.ack(0, 10) };
    assert_eq!(scene.client_sends(fin), Verdict::Forward);
    scene.endpoint_sends(Packet { ack: to_endpoint + 1, ..scene.data(10, 5) });
    let reset = Scene::packet(client, to_client, RST, 0);
    assert_eq!((scene.client_sends(reset), scene.state()), (Verdict::Forward, state::ENDED));
    assert!(scene.flow.marks.get() & mark::CLIENT_RESET != 0);
    // Without a FIN, such a number is one that was acknowledged long ago.
    let mut scene = Scene::begun(NUMBERS);
    assert_eq!(scene.client_sends(Scene::packet(client - 1, to_client, RST, 0)), Verdict::Forward);
    assert_eq!(scene.state(), state::ACTIVE);
}

#[test]
fn segments_beyond_the_clients_window_are_counted_in_order_with_their_fin() {
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    let mut scene = Scene::begun(NUMBERS);
    // The client offers 128 000 bytes.
    scene.endpoint_sends(scene.data(10, 130_000));
    scene.endpoint_sends(scene.data(130_010, 5000));
    let fin = Scene::packet(endpoint + 135_010, to_endpoint, FIN | ACK, 0);
    scene.endpoint_sends(fin);
    assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), 135_010);
    scene.client_sends(Scene::packet(client, to_client + 135_011, FIN | ACK, 0));
    scene.endpoint_sends(Scene::packet(endpoint + 135_011, to_endpoint + 1, ACK, 0));
    assert_eq!(scene.state(), state::ENDED);
}

/// The endpoint fills the window that the agent has offered to it, which is larger than the client's. The client opens its own before
/// the bytes arrive there, and takes them.
#[test]
fn bytes_in_the_agents_window_count_wherever_the_client_has_opened_its_own() {
    let Numbers { client, to_client, endpoint, to_endpoint } = NUMBERS;
    for late_segment in [false, true] {
        let mut scene = Scene::armed(NUMBERS);
        let own = scene.own_ack(ENDPOINT);
        // 512 000 bytes; the client offers 128 000. A later packet with less takes nothing back, and another socket's says nothing.
        for packet in [
            OwnPacket { window: 1000, ..own },
            OwnPacket { window: 900, ..own },
            OwnPacket { window: 2000, cookie: 7, ..own },
            OwnPacket { window: 2000, flags: RST, ..own },
        ] {
            assert_eq!(scene.leaves(ENDPOINT, &packet), Leaving::Pass);
        }
        scene.endpoint_sends(scene.data(0, 10));
        let mut segments = vec![(10, 100_000), (100_010, 200_000), (300_010, 100_000)];
        if late_segment {
            segments.swap(0, 2);
        }
        let fin = Scene::packet(endpoint + 400_010, to_endpoint, FIN | ACK, 0);
        if late_segment {
            scene.endpoint_sends(fin);
        }
        for (at, payload) in segments {
            scene.endpoint_sends(scene.data(at, payload));
        }
        if !late_segment {
            scene.endpoint_sends(fin);
        }
        assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), 400_010);
        // Beyond both windows is nothing that the endpoint would send.
        scene.endpoint_sends(scene.data(600_000, 10));
        assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), 400_010);
        scene.client_sends(Scene::packet(client, to_client + 400_011, FIN | ACK, 0));
        scene.endpoint_sends(Scene::packet(endpoint + 400_011, to_endpoint + 1, ACK, 0));
        assert_eq!((scene.flow.legs[ENDPOINT].closed.get(), scene.state()), (1, state::ENDED));
    }
}

#[test]
fn payload_of_the_client_is_dropped_and_its_end_becomes_a_reset() {
    let Numbers { client, to_client, .. } = NUMBERS;
    for end in [FIN | ACK, RST] {
        let mut scene = Scene::begun(NUMBERS);
        // Old bytes pass: a repetition, or a probe.
        let old = Scene::packet(client - 5, to_client, ACK, 5);
        assert_eq!(scene.client_sends(old), Verdict::Forward);
        assert_eq!(scene.flow.marks.get(), 0);
        for payload in [8, 3] {
            let new = Scene::packet(client - 2, to_client, ACK, payload);
            assert_eq!((scene.client_sends(new), scene.flow.marks.get()), (Verdict::Drop, mark::CLIENT_SENT));
        }
        assert_eq!((scene.kernel.events, scene.flow.legs[CLIENT].refused.get()), (2, 2), "told once");
        // Its acknowledgements pass with the number that the endpoint knows, and open the window.
        let ack = Scene::packet(client + 6, to_client + 10, ACK, 0);
        assert_eq!(scene.client_sends(ack), Verdict::Acknowledge);
        assert_eq!(scene.flow.legs[CLIENT].told.get() as u32, to_client + 10);
        let ended = Scene::packet(client + 6, to_client + 10, end, 0);
        assert_eq!(scene.client_sends(ended), Verdict::Reset);
        assert_eq!(scene.state(), state::ENDED);
    }
}

#[test]
fn byte_with_the_number_of_the_clients_fin_is_refused() {
    let mut scene = Scene::begun(NUMBERS);
    let fin = Packet { flags: FIN | ACK, ..scene.ack(0, 10) };
    assert_eq!((scene.client_sends(fin), scene.client_sends(fin)), (Verdict::Forward, Verdict::Forward));
    assert_eq!(scene.client_sends(scene.ack(1, 10)), Verdict::Forward, "the acknowledgement after it");
    assert_eq!(scene.client_sends(Packet { payload: 1, ..scene.ack(0, 10) }), Verdict::Drop);
    assert_eq!(scene.flow.legs[CLIENT].refused.get(), 1);
}

#[test]
fn syn_forgets_what_has_ended() {
    let mut scene = Scene::begun(NUMBERS);
    scene.endpoint_sends(Scene::packet(NUMBERS.endpoint + 10, NUMBERS.to_endpoint, RST, 0));
    let syn = Scene::packet(1, 0, SYN, 0);
    assert_eq!((scene.client_sends(syn), scene.endpoint_sends(syn)), (Verdict::Forget, Verdict::Forget));
    assert_eq!(scene.client_sends(Packet { flags: SYN | ACK, ..syn }), Verdict::Forward);
    // The agent's kernel uses the addresses again: at any time, because it knows its own sockets.
    assert_eq!(scene.leave(ENDPOINT, 9, SYN), Leaving::Forget);
    let mut active = Scene::begun(NUMBERS);
    assert_eq!((active.leave(ENDPOINT, 9, SYN), active.leave(ENDPOINT, 9, ACK)), (Leaving::Forget, Leaving::Pass));
    active.flow.state.set(state::REPLACED);
    assert_eq!((active.client_sends(syn), active.leave(CLIENT, 1, FIN)), (Verdict::Pass, Leaving::Pass));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Wherever the sequence numbers begin, they may wrap within the stream.
    #[test]
    fn numbers_wrap(client: u32, to_client: u32, endpoint: u32, to_endpoint: u32, pieces in proptest::collection::vec(1u32..3000, 1..40)) {
        let numbers = Numbers { client, to_client, endpoint, to_endpoint };
        let mut scene = Scene::begun(numbers);
        let mut sent = 10;
        for piece in pieces {
            let packet = scene.data(sent, piece);
            prop_assert_eq!(scene.endpoint_sends(packet), Verdict::Forward);
            sent += piece;
            // What the client then acknowledges is, shifted, what the endpoint sent.
            let ack = scene.ack(0, sent);
            let shifted = ack.ack.wrapping_add(scene.flow.legs[CLIENT].shift().ack);
            prop_assert_eq!(shifted, endpoint.wrapping_add(sent));
            prop_assert_eq!(scene.client_sends(ack), Verdict::Forward);
        }
        prop_assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), u64::from(sent));
        scene.endpoint_sends(Packet { flags: FIN | ACK, ..scene.data(sent, 0) });
        scene.client_sends(Packet { flags: FIN | ACK, ..scene.ack(0, sent + 1) });
        let last = Packet { ack: to_endpoint.wrapping_add(1), ..scene.data(sent + 1, 0) };
        scene.endpoint_sends(last);
        prop_assert_eq!(scene.state(), state::ENDED);
    }
}

/// Before the flow began, the endpoint had the larger window of the agent.
#[test]
fn segment_that_begins_in_the_window_counts() {
    let mut scene = Scene::begun(NUMBERS);
    let large = 1 << 20;
    scene.endpoint_sends(scene.data(10, large));
    assert_eq!(scene.flow.legs[ENDPOINT].bytes.get(), u64::from(10 + large));
    scene.client_sends(scene.ack(0, 10 + large));
    assert_eq!(scene.flow.legs[CLIENT].told.get() as u32, NUMBERS.to_client.wrapping_add(10 + large));
}

#[test]
fn only_packets_in_flight_are_quoted() {
    let mut scene = Scene::begun(NUMBERS);
    scene.flow.legs[ENDPOINT].facts.ends = Ends { peer: [0, 0, 0, 7], own: [0, 0, 0, 8], ports: 7 };
    scene.endpoint_sends(scene.data(10, 2000));
    scene.client_sends(scene.ack(0, 500));
    // The client has the first 500 of 2010 bytes.
    for (at, expected) in [(0, false), (499, false), (500, true), (2009, true), (2010, false), (1 << 31, false)] {
        let quoted = Quoted { source: [1; 4], destination: [2; 4], ports: 3, seq: NUMBERS.to_client.wrapping_add(at) };
        let (source, destination, seq) = ([0, 0, 0, 7], [0, 0, 0, 8], NUMBERS.endpoint.wrapping_add(at));
        let sent = Quoted { source, destination, ports: 7, seq };
        assert_eq!(as_sent(&scene.flow, &quoted), expected.then_some(sent), "{at}");
    }
}
