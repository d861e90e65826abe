//! "EPP-Core", our own profile: what every user of an EPP relies on and no conformance suite checks. Most of its tests are in
//! other test binaries (`docs/conformance.md` lists them); this file has the rest.

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    Client, Plan,
    content::Alphabet,
    eventually,
    model_server::{Fault, FaultKind, Framing, Lengths, Pauses},
    reader::at_least,
};

use crate::SOON;
use crate::cluster::{InferencePool, assert_carried, gateway};

/// Server-sent events are not held back: the client gets each event while the model works on the next, and every event sent
/// before a stall.
pub(crate) async fn events_arrive_as_they_are_sent(mode: SteeringMode) {
    const EVENT: u64 = 40;
    let pool = InferencePool::start("primary", 1).await;
    let gateway = gateway(mode, &[&pool], "");
    for events in [1, 2, 100] {
        // One chunk per event: a two-digit size and two line ends.
        let wire = events * (EVENT + 6);
        let plan = Plan {
            framing: Framing::Chunked,
            size: 1000 * EVENT,
            alphabet: Alphabet::Text,
            headers: vec![("content-type".to_owned(), "text/event-stream".to_owned())],
            chunks: Lengths::Fixed(EVENT),
            writes: Lengths::Fixed(EVENT + 6),
            pauses: Some(Pauses { seed: 1, every: 1, up_to_us: 1000 }),
            fault: Some(Fault { after: wire, kind: FaultKind::Stall }),
            ..Plan::default()
        };
        let mut client = Client::connect(gateway.addr).await.unwrap();
        client.send(&plan.request()).await.unwrap();
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut checker = plan.checker();
        assert_eq!(at_least(&mut client, &mut checker, events * EVENT).await.unwrap(), None);
        assert_eq!(checker.offset(), events * EVENT);
        client.reset().unwrap();
    }
    // A broken response is counted a moment later.
    eventually(SOON, || gateway.count("penstock_client_aborts_total", &[]) == 3).await;
    assert_carried(&gateway, mode);
}
