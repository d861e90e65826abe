//! Memory pressure: the agent runs in its own cgroup with a tight limit while many clients read slowly. On every path, a
//! response is complete or visibly broken, never short with an orderly close.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use penstock_tests::{
    BodyEnd, Client, ModelServer, Plan, Reader,
    agent_process::AgentProcess,
    model_server::{Framing, Lengths, Options, Pauses},
};

const FRAMINGS: [Framing; 3] = [Framing::ContentLength, Framing::Chunked, Framing::UntilClose];
const CLIENTS: u64 = 60;
/// The first limit on all socket buffers, in bytes: far below the clients' send buffers.
const TCP: u64 = 3 << 20;

/// A cgroup of the memory controller, in either hierarchy (cgroups(7)). Dropping it removes it, once it is empty.
struct Group(PathBuf);

/// The hierarchy's file that limits memory, and the one that counts hits of the limit.
#[derive(Clone, Copy, PartialEq)]
enum Files {
    Unified,
    /// The file that limits socket buffers.
    Legacy,
}

impl Group {
    fn new() -> (Self, Files) {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mounted = |kind: &str, option: &str| {
            mounts.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                let fits = fields[2] == kind && fields[3].split(',').any(|one| option.is_empty() || one == option);
                fits.then(|| PathBuf::from(fields[1]))
            })
        };
        let name = format!("penstock-test-{}", std::process::id());
        if let Some(legacy) = mounted("cgroup", "memory") {
            let group = legacy.join(name);
            std::fs::create_dir(&group).unwrap();
            return (Self(group), Files::Legacy);
        }
        let unified = mounted("cgroup2", "").expect("a cgroup hierarchy with the memory controller");
        // The controller may not be delegated yet.
        let _ = std::fs::write(unified.join("cgroup.subtree_control"), "+memory");
        let group = unified.join(name);
        std::fs::create_dir(&group).unwrap();
        assert!(group.join("memory.max").exists(), "no memory controller in {}", group.display());
        (Self(group), Files::Unified)
    }

    fn write(&self, file: &str, value: u64) {
        let path = self.0.join(file);
        std::fs::write(&path, value.to_string()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    fn count(&self, file: &str, field: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.trim().parse().unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel finishes a process's accounts slightly after its exit.
        let gone = |path: &Path| std::fs::remove_dir(path).is_ok();
        let begin = std::time::Instant::now();
        while !gone(&self.0) && begin.elapsed() < Duration::from_secs(2) {
            std::thread::yield_now();
        }
    }
}

#[tokio::test]
async fn responses_under_memory_pressure_are_whole_or_broken() {
    for steering in ["local", "ingress", "auto", "off"] {
        under_pressure(steering).await;
    }
}

/// Whether the client's response is complete. An incomplete one has to be broken visibly.
async fn is_whole(addr: SocketAddr, id: u64) -> bool {
    let framing = FRAMINGS[id as usize % 3];
    let plan = Plan {
        framing,
        size: 1 << 20,
        stream_id: id,
        writes: Lengths::Random { seed: id, max: 30_000 },
        pauses: Some(Pauses { seed: id, every: 8, up_to_us: 1000 }),
        ..Plan::default()
    };
    let reader = match id % 2 {
        0 => Reader::Slow { bytes: 16 << 10, tick: Duration::from_millis(2) },
        _ => Reader::Stalled { after: 50_000, pause: Duration::from_millis(700) },
    };
    let Ok(mut client) = Client::connect_with(addr, Some(16 << 10)).await else { return false };
    if client.send(&plan.request()).await.is_err() {
        return false;
    }
    let Ok(head) = client.head().await else { return false };
    if head.status != 200 {
        return false;
    }
    let mut checker = plan.checker();
    match reader.take(&mut client, &mut checker).await {
        Ok(read) if read.end == BodyEnd::Complete => {
            assert_eq!(read.len, plan.size, "a clean end that is short: {plan:?}");
            true
        }
        Ok(read) => {
            // A truncated body delimited by close must end with a reset.
            assert!(framing != Framing::UntilClose || read.end == BodyEnd::Reset, "{read:?}");
            false
        }
        Err(error) => panic!("{error:#}: {plan:?}"),
    }
}

async fn under_pressure(steering: &str) {
    let server = ModelServer::start(Options { idle_close: None, ..Options::default() }).await.unwrap();
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    // Declared first, so that the process ends before its group is removed.
    let (group, files) = Group::new();
    let agent = AgentProcess::start(listen, server.addr, steering, "[timeouts]\nidle = \"1500ms\"").await.unwrap();
    // From now on, pages and sockets are charged to the group.
    group.write("cgroup.procs", u64::from(agent.process.id()));
    if files == Files::Unified {
        // Pages of the process and buffers of its sockets together.
        group.write("memory.max", 48 << 20);
    } else {
        // The process has room: sockets are what is short.
        group.write("memory.limit_in_bytes", 64 << 20);
    }
    // How much is in buffers at once depends on how fast all sides are, so the limit falls until it is met.
    let mut limit = TCP;
    loop {
        if files == Files::Legacy {
            group.write("memory.kmem.tcp.max_usage_in_bytes", 0);
            group.write("memory.kmem.tcp.limit_in_bytes", limit);
        }
        let clients: Vec<_> = (0..CLIENTS).map(|id| tokio::spawn(is_whole(agent.addr, id))).collect();
        let mut complete = 0;
        for client in clients {
            complete += u64::from(client.await.unwrap());
        }
        println!("{steering}: {complete} of {CLIENTS} complete with at most {limit} bytes in socket buffers");
        let pressed = match files {
            Files::Unified => group.count("memory.events", "max ") > 0,
            // The kernel takes what it must and makes sockets wait for the rest; it does not count how often.
            Files::Legacy => group.count("memory.kmem.tcp.max_usage_in_bytes", "") >= limit,
        };
        if pressed {
            break;
        }
        limit /= 2;
        assert!(limit >= TCP / 16, "{steering}: there was no pressure");
    }

    // The number of complete responses depends on the machine. A client that comes after the pressure ends is served.
    let plan = Plan { size: 1 << 20, ..Plan::default() };
    let mut client = Client::connect(agent.addr).await.unwrap();
    client.send(&plan.request()).await.unwrap();
    assert_eq!(client.head().await.unwrap().status, 200, "{steering}");
    let read = Reader::Fast.take(&mut client, &mut plan.checker()).await.unwrap();
    assert_eq!((read.len, read.end), (plan.size, BodyEnd::Complete), "{steering}");
}
