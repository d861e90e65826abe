//! The proof that this kernel steers without losing a byte, made on loopback connections before the first request.
//!
//! Each case sends a patterned response through the same code that serves clients and compares every byte: a stalled
//! reader (the room gate trips, the rest is relayed), chunked in small pieces, and an end by FIN. A kernel that fails one
//! only relays.

use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::BytesMut;
use penstock_common::{framing::Framing, slot::stop};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use crate::{
    client::ClientSocket,
    config::{self, SteeringMode},
    deliver::{Account, Delivery, End, Target},
    endpoint::connection::EndpointConnection,
    kernel::{Kernel, slots::Lane, version},
    steer::{Steering, WorkerSteering},
};

/// The whole proof; it takes some tens of milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
const BODY: usize = 4 << 20;
/// Written at once; several have room in a send buffer.
const PIECE: usize = 32 * 1024;
/// A sender that gets on no further for this long is stuck.
const QUIET: Duration = Duration::from_millis(20);
const SEND_BUFFER: u32 = 256 * 1024;

/// Loads the kernel program and has it prove itself. Whatever fails is the reason why the agent only relays.
pub fn start(config: &config::Steering) -> Steering {
    if config.mode == SteeringMode::Off {
        return Steering::Off;
    }
    let release = version::release();
    if !version::is_sound(&release) {
        return Steering::Unavailable(format!("kernel {release} may lose or repeat bytes in sockmap").into());
    }
    let mut kernel = match Kernel::load(config.max_flows) {
        Ok(kernel) => kernel,
        Err(error) => return Steering::Unavailable(error.to_string().into()),
    };
    if config.mode != SteeringMode::Ingress {
        kernel.try_local(config.cgroup.as_deref());
    }
    let kernel = Arc::new(kernel);
    if let Err(error) = prove(&kernel, Lane::Ingress) {
        return Steering::Unavailable(format!("self-test of the ingress path: {error:#}").into());
    }
    if kernel.local().is_err() {
        return Steering::Active(kernel);
    }
    let Err(error) = prove(&kernel, Lane::Local) else { return Steering::Active(kernel) };
    // Without its programs, which would look at every endpoint's messages for nothing.
    drop(kernel);
    match Kernel::load(config.max_flows) {
        Ok(mut kernel) => {
            kernel.without_local(&format!("self-test of the local path: {error:#}"));
            Steering::Active(Arc::new(kernel))
        }
        Err(error) => Steering::Unavailable(error.to_string().into()),
    }
}

/// Runs every case on one path.
pub fn prove(kernel: &Arc<Kernel>, lane: Lane) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let steering = WorkerSteering::new(kernel)?;
    runtime.block_on(async {
        tokio::time::timeout(DEADLINE, async {
            stalled_reader(&steering, lane).await.context("a reader that stalls")?;
            small_chunks(&steering, lane).await.context("a chunked stream of small pieces")?;
            end_by_fin(&steering, lane).await.context("an end by FIN")
        })
        .await
        .with_context(|| format!("no result within {DEADLINE:?}"))?
    })
}

/// Byte at a position of the pattern.
fn pattern(at: usize) -> u8 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]
}

/// The agent's side of two connections, and the far ends: the server that answers and the reader that asked.
struct Rig {
    endpoint: EndpointConnection,
    client: ClientSocket,
    target: Target,
}

impl Rig {
    async fn new(steering: &Rc<WorkerSteering>, lane: Lane) -> Result<(Self, TcpStream, TcpStream)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address: SocketAddr = listener.local_addr()?;
        let (endpoint, server) = tokio::join!(
            EndpointConnection::connect(address, Some(DEADLINE), Some(steering), SEND_BUFFER),
            listener.accept()
        );
        let (reader, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let mut client = ClientSocket::new(accepted?.0)?;
        let key = client.make_target(steering, SEND_BUFFER)?;
        let (mut endpoint, mut server) = (endpoint?, server?.0);
        server.set_nodelay(true)?;
        endpoint.announce(Some(key));
        // In place of a head.
        server.write_all(b"h").await?;
        endpoint.read(&mut BytesMut::with_capacity(1)).await?;
        let source = endpoint.source().context("the kernel refused the endpoint's socket")?;
        ensure!(lane == Lane::Ingress || source.is_local_to(key), "the endpoint's own socket was not recognised");
        Ok((Self { endpoint, client, target: Target { key, send_buffer: SEND_BUFFER, lane } }, server, reader?))
    }

    async fn deliver(&mut self, framing: Framing) -> (End, Account) {
        let (client, endpoint) = (&mut self.client, &mut self.endpoint);
        let mut delivery = Delivery::new(client, endpoint, framing, BytesMut::new(), Some(DEADLINE));
        delivery.target = Some(self.target);
        (delivery.run().await, delivery.account)
    }
}

fn compare(got: &[u8], want: &[u8]) -> Result<()> {
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        bail!("byte {at} of {} is wrong", want.len());
    }
    ensure!(got.len() == want.len(), "{} bytes of {} arrived", got.len(), want.len());
    Ok(())
}

async fn stalled_reader(steering: &Rc<WorkerSteering>, lane: Lane) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, lane).await?;
    let body: Vec<u8> = (0..BODY).map(pattern).collect();
    let mut got = vec![0; BODY];
    let (start_reading, stalled) = oneshot::channel::<()>();
    let sent = Cell::new(0);
    let write = async {
        while sent.get() < BODY {
            let end = BODY.min(sent.get() + PIECE);
            sent.set(sent.get() + server.write(&body[sent.get()..end]).await?);
        }
        std::io::Result::Ok(())
    };
    let read = async {
        let _ = stalled.await;
        reader.read_exact(&mut got).await.map(drop)
    };
    let release = async {
        // The reader begins when the sender has nowhere left to send to: it has stopped getting on.
        let mut before = 0;
        while sent.get() == 0 || sent.get() != before {
            before = sent.get();
            tokio::time::sleep(QUIET).await;
        }
        let _ = start_reading.send(());
    };
    let ((end, account), written, read, ()) =
        tokio::join!(rig.deliver(Framing::length(BODY as u64)), write, read, release);
    written?;
    read?;
    ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
    ensure!(account.carried(lane) > 0, "the kernel redirected nothing");
    ensure!(account.stops[stop::ROOM as usize] > 0, "the room gate did not trip");
    ensure!(account.carried(lane) + account.relayed == BODY as u64, "the account does not add up: {account:?}");
    compare(&got, &body)
}

async fn small_chunks(steering: &Rc<WorkerSteering>, lane: Lane) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, lane).await?;
    let mut wire = Vec::new();
    for n in 1..=64usize {
        wire.extend_from_slice(format!("{n:x};n=v\r\n").as_bytes());
        wire.extend((0..n).map(|at| pattern(n * 64 + at)));
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\nx-trailer: 1\r\n\r\n");
    let mut got = vec![0; wire.len()];
    let write = async {
        for piece in wire.chunks(37) {
            server.write_all(piece).await?;
            tokio::task::yield_now().await;
        }
        std::io::Result::Ok(())
    };
    let ((end, account), written, read) =
        tokio::join!(rig.deliver(Framing::chunked()), write, reader.read_exact(&mut got));
    written?;
    read?;
    ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
    ensure!(account.carried(lane) > 0, "the kernel redirected nothing");
    compare(&got, &wire)
}

async fn end_by_fin(steering: &Rc<WorkerSteering>, lane: Lane) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, lane).await?;
    let body: Vec<u8> = (0..100_000).map(pattern).collect();
    let mut got = Vec::new();
    let write = async {
        server.write_all(&body).await?;
        server.shutdown().await
    };
    let deliver = async {
        let outcome = rig.deliver(Framing::until_close()).await;
        rig.client.close().await;
        outcome
    };
    let ((end, account), written, read) = tokio::join!(deliver, write, async {
        let read = reader.read_to_end(&mut got).await;
        drop(reader);
        read
    });
    written?;
    read?;
    ensure!(end == End::Complete { reusable: false }, "the delivery ended as {end:?}");
    ensure!(account.carried(lane) + account.relayed == body.len() as u64, "the account does not add up: {account:?}");
    compare(&got, &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_steers() {
        let mut kernel = Kernel::load(64).expect("load");
        kernel.try_local(None);
        assert_eq!(kernel.local(), Ok(()));
        let kernel = Arc::new(kernel);
        for _ in 0..10 {
            prove(&kernel, Lane::Ingress).expect("self-test of the ingress path");
            prove(&kernel, Lane::Local).expect("self-test of the local path");
        }
        assert_eq!(kernel.events().take_missed(), 0);
    }
}
