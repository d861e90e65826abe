//! What the service manager is told.

use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use penstock_tests::{
    Client, Plan,
    agent_process::AgentProcess,
    model_server::{Fault, FaultKind},
};

use super::{Scene, ends_well, is_served};
use crate::SOON;

/// The service manager's socket.
struct Manager(UnixDatagram);

impl Manager {
    /// One that watches the agents of the scene, and the environment variable that names its socket.
    fn of(scene: &Scene) -> (Self, String) {
        let path = scene.folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        (Self(socket), format!("NOTIFY_SOCKET={}", path.display()))
    }

    /// The next message that begins like this. Before it come signs of life, and what the agent waits for.
    async fn told(&self, begin: &'static str) -> String {
        let socket = self.0.try_clone().unwrap();
        let receive = move || loop {
            let mut bytes = [0; 1024];
            let length = socket.recv(&mut bytes).unwrap_or_else(|error| panic!("{begin}: {error}"));
            let message = String::from_utf8(bytes[..length].to_vec()).unwrap();
            if message.starts_with(begin) {
                return message;
            }
            let is_between = message == "WATCHDOG=1" || message.starts_with("STATUS=waiting for: ");
            assert!(is_between, "expected {begin}, found {message}");
        };
        tokio::task::spawn_blocking(receive).await.unwrap()
    }
}

#[tokio::test]
async fn service_manager_is_told_of_start_reload_takeover_and_stop() {
    let scene = Scene::new().await;
    let (manager, notify) = Manager::of(&scene);
    let through = ["env", &notify, "WATCHDOG_USEC=600000"];
    let text = scene.text(1, "off", "");
    let old = AgentProcess::start_through_with_text(&through, &text).await.unwrap();
    assert_eq!(manager.told("READY=1").await, "READY=1\nSTATUS=ready");
    manager.told("WATCHDOG=1").await;

    old.process.signal(Signal::SIGHUP).unwrap();
    let reloading = manager.told("RELOADING=1").await;
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(manager.told("READY=1").await, "READY=1\nSTATUS=ready");
    manager.told("WATCHDOG=1").await;

    // Both are in the tests' control group, as processes of one service are.
    let new = AgentProcess::start_through_with_text(&through, &text).await.unwrap();
    let main = format!("MAINPID={}\nSTATUS=handed over, finishing responses", new.process.id());
    assert_eq!(manager.told("MAINPID=").await, main);
    assert_eq!(manager.told("READY=1").await, "READY=1\nSTATUS=ready");
    is_served(&new).await;
    ends_well(old).await;
    manager.told("WATCHDOG=1").await;
    new.process.terminate().unwrap();
    manager.told("STOPPING=1").await;
    ends_well(new).await;
}

/// Otherwise it would end a drain that takes longer than its watchdog waits.
#[tokio::test]
async fn signs_of_life_go_on_during_a_drain() {
    let scene = Scene::new().await;
    let (manager, notify) = Manager::of(&scene);
    let through = ["env", &notify, "WATCHDOG_USEC=600000"];
    let mut agent = AgentProcess::start_through_with_text(&through, &scene.text(2, "off", "")).await.unwrap();
    manager.told("READY=1").await;
    let fault = Some(Fault { after: 1000, kind: FaultKind::Stall });
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.send(&Plan { size: 2000, fault, ..Plan::default() }.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200);
    agent.process.terminate().unwrap();
    manager.told("STOPPING=1").await;
    // Three in 600 ms: for longer than a silent worker is taken to be alive, and than the lame duck.
    for _ in 0..30 {
        manager.told("WATCHDOG=1").await;
    }
    drop(client);
    agent.process.ended(SOON).await.unwrap();
}
