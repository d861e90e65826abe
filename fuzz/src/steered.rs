//! A response body, cut anywhere, that the kernel programs carry: the client must get each byte of the message once and in order,
//! and a truncated or invalid message must never look complete.
//!
//! `BPF_PROG_TEST_RUN` does not run `sk_skb` and `sk_msg` programs (their `bpf_prog_ops` are empty), so the target steers real
//! loopback connections, as the agent does. It panics without the capabilities that steering needs.

use std::{net::Ipv4Addr, rc::Rc, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bytes::BytesMut;
use penstock_agent::{
    command::Kernel,
    parts::{
        ClientSocket, ConnectionTimeouts, Delivery, End, EndpointConnection, Linger, Session, Source, Target,
        WorkerSteering,
    },
};
use penstock_common::{framing::Framing, path::Path};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

use crate::input;

/// A delivery that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(20);
const BUFFER: u32 = 256 << 10;
const FLOWS: u32 = 64;

struct World {
    runtime: Runtime,
    steering: Rc<WorkerSteering>,
    kernel: Arc<Kernel>,
    has_local: bool,
}

impl World {
    fn new() -> Result<Self> {
        let mut kernel = Kernel::load(FLOWS)?;
        kernel.try_local(None);
        let kernel = Arc::new(kernel);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let steering = WorkerSteering::new(&kernel)?;
        Ok(Self { runtime, has_local: kernel.local().is_ok(), steering, kernel })
    }
}

thread_local! {
    static WORLD: World = World::new().expect("the kernel programs load: this needs root or CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON");
}

pub fn run(data: &[u8]) {
    let (mut choices, wire) = input::split(data, 5);
    let kind = choices.byte();
    let lengths = [choices.byte(), choices.byte(), choices.byte()];
    let length = u64::from(choices.byte());
    let framing = match kind % 3 {
        0 => Framing::chunked(),
        1 => Framing::length(length),
        _ => Framing::until_close(),
    };
    WORLD.with(|world| {
        if world.kernel.slots().is_exhausted() {
            world.kernel.slots().reclaim();
        }
        let path = if kind & 0x80 != 0 && world.has_local { Path::Local } else { Path::Ingress };
        let outcome = world.runtime.block_on(async {
            let delivery = deliver(world, path, framing, wire, lengths, kind & 0x40 != 0);
            tokio::time::timeout(PATIENCE, delivery).await.context("the delivery is stuck")?
        });
        outcome.expect("every byte once, in order");
    });
}

async fn deliver(
    world: &World,
    path: Path,
    framing: Framing,
    wire: &[u8],
    lengths: [u8; 3],
    yields: bool,
) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let times = ConnectionTimeouts { keep_alive: PATIENCE, connect: Some(PATIENCE), unreachable: None };
    let (endpoint, server) =
        tokio::join!(EndpointConnection::connect(address, times, Some(&world.steering), BUFFER), listener.accept());
    let (reader, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (mut endpoint, mut server, mut reader) = (endpoint?, server?.0, reader?);
    let mut client = ClientSocket::new(accepted?.0)?;
    let key = client.make_target(&world.steering, BUFFER)?;
    server.set_nodelay(true)?;
    endpoint.announce(Some(key));
    // This byte stands for the head.
    server.write_all(b"h").await?;
    endpoint.read(&mut BytesMut::with_capacity(1)).await?;
    ensure!(
        path != Path::Local || endpoint.source().is_some_and(Source::admit),
        "the endpoint's socket is not admitted"
    );

    let write = async {
        for piece in input::pieces(wire, lengths) {
            // The agent closes the connection at the end of the message, or when it is invalid.
            if server.write_all(piece).await.is_err() {
                break;
            }
            if yields {
                tokio::task::yield_now().await;
            }
        }
        drop(server);
    };
    let carry = async {
        let target = Target { key, send_buffer: BUFFER };
        let mut session = Session::new(path, target, framing, endpoint.source());
        session.idle = Some(PATIENCE);
        let mut delivery = Delivery::new(&mut client, &mut endpoint, session, BytesMut::new());
        let end = delivery.run().await;
        drop(delivery);
        drop(endpoint);
        match end {
            End::Complete { .. } => {
                let _ = client.close(Linger::default()).await;
            }
            _ => client.abort().await,
        }
        end
    };
    let read = async {
        let mut got = Vec::new();
        let orderly = reader.read_to_end(&mut got).await.is_ok();
        drop(reader);
        (got, orderly)
    };
    let (end, (), (got, orderly)) = tokio::join!(carry, write, read);
    check(framing, wire, end, &got, orderly)
}

/// Checks what the client got of the message in `wire`, and how its connection ended.
fn check(framing: Framing, wire: &[u8], end: End, got: &[u8], orderly: bool) -> Result<()> {
    let mut expected = framing;
    let taken = expected.feed(wire);
    let message = &wire[..taken];
    if expected.may_close() {
        ensure!(matches!(end, End::Complete { .. }), "a complete message ended as {end:?}");
        ensure!(orderly, "a complete message ends with a reset");
    } else {
        ensure!(end == End::Broken, "an incomplete message ended as {end:?}");
    }
    if expected.is_invalid() {
        ensure!(message.starts_with(got), "the client got bytes that are not in the message");
    } else {
        ensure!(got == message, "{} bytes of {} arrived", got.len(), message.len());
    }
    Ok(())
}
