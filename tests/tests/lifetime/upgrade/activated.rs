//! Socket activation: the service manager opens the sockets, and keeps them when the agent ends.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    process::Command,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use penstock_tests::{Client, Process, Request};

use super::{Scene, load::queue};
use crate::{ANY_PORT, MODELS, SOON};

/// Starts an agent with these sockets as descriptors 3 and so on.
fn activate(text: &str, names: &str, sockets: &[&TcpListener]) -> Process {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), text).unwrap();
    let (_, config) = config.keep().unwrap();
    let open = sockets.iter().enumerate().map(|(at, socket)| {
        fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        format!(" {}<&{}", at + 3, socket.as_raw_fd())
    });
    let (open, count): (String, usize) = (open.collect(), sockets.len());
    let script = format!("LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names} exec \"$0\" \"$@\"{open}");
    let mut command = Command::new("bash");
    command.args(["-c", &script]).arg(Process::binary("penstock").unwrap());
    command.env("PENSTOCK_LOG_FORMAT", "json").args(["run", "--config"]).arg(config);
    let process = Process::spawn(command).unwrap();
    for socket in sockets {
        fcntl(socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    }
    process
}

async fn answers(address: SocketAddr, path: &str) -> u16 {
    Client::connect(address).await.unwrap().request(&Request::get(path)).await.unwrap().status()
}

#[tokio::test]
async fn sockets_of_the_service_manager_outlive_agents() {
    let scene = Scene::new().await;
    let [listen, tls, admin] = [(); 3].map(|()| TcpListener::bind(ANY_PORT).unwrap());
    let [plain, secured, probed] = [&listen, &tls, &admin].map(|socket| socket.local_addr().unwrap());
    for workers in [3, 1] {
        // Before an agent runs, connections wait.
        let queued = queue(plain, 20).await;
        let text = scene.text(workers, "off", "").replace("[process]\nupgrade_socket", "[process]\n# upgrade_socket");
        let mut agent = activate(&text, "admin:listen:tls", &[&admin, &listen, &tls]);
        for mut client in queued {
            assert_eq!(client.response().await.unwrap().status(), 200);
        }
        agent.line("\"admin\":", SOON).await.unwrap();
        assert_eq!((answers(plain, MODELS).await, answers(probed, "/readyz").await), (200, 200));
        let stream = scene.certificate.connect(secured, &["http/1.1"]).await.unwrap();
        assert_eq!(Client::over(stream, secured).request(&Request::get(MODELS)).await.unwrap().status(), 200);
        agent.terminate().unwrap();
        assert_eq!(agent.ended(SOON).await.unwrap().code(), Some(0), "{:#?}", agent.output());
    }
}

#[tokio::test]
async fn socket_without_a_listener_is_refused_by_name() {
    let scene = Scene::new().await;
    let socket = TcpListener::bind(ANY_PORT).unwrap();
    let mut agent = activate(&scene.text(1, "off", ""), "web", &[&socket]);
    agent.line("descriptor \"web\" of socket activation", SOON).await.unwrap();
    assert_eq!(agent.ended(SOON).await.unwrap().code(), Some(1));
}
