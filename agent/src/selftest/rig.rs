//! The setup of a self-test case: two loopback connections as the agent makes them, their far ends, and bytes derived
//! from their position.

use std::{
    cell::RefCell,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};

use crate::{
    client::ClientSocket,
    deliver::{Delivery, End},
    endpoint::{connection::EndpointConnection, timeouts::ConnectionTimeouts},
    steer::{
        Source, WorkerSteering,
        account::Account,
        session::{Session, Target},
    },
    tee::Tee,
};

/// Longer than any case may take; the self-test as a whole is limited.
const PATIENCE: Duration = Duration::from_secs(60);
/// SO_SNDBUF of the client connection and SO_RCVBUF of the endpoint connection, after the kernel doubled it.
pub(super) const BUFFER: u32 = 256 * 1024;

/// The agent's side of two connections.
pub(super) struct Rig {
    pub(super) endpoint: EndpointConnection,
    pub(super) client: ClientSocket,
    path: Path,
    target: Target,
}

impl Rig {
    /// Creates the connections. Also returns the far ends: the server and the reader.
    pub(super) async fn new(steering: &Rc<WorkerSteering>, path: Path) -> Result<(Self, TcpStream, TcpStream)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address: SocketAddr = listener.local_addr()?;
        let times = ConnectionTimeouts { keep_alive: PATIENCE, connect: Some(PATIENCE), unreachable: None };
        let (endpoint, server) =
            tokio::join!(EndpointConnection::connect(address, times, Some(steering), BUFFER), listener.accept());
        let (reader, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let mut client = ClientSocket::new(accepted?.0)?;
        client.set_idle(Some(PATIENCE));
        let key = client.make_target(steering, BUFFER)?;
        let (endpoint, mut server) = (endpoint?, server?.0);
        server.set_nodelay(true)?;
        let mut rig = Self { endpoint, client, path, target: Target { key, send_buffer: BUFFER } };
        rig.announce();
        // Stands in for a response head.
        server.write_all(b"h").await?;
        rig.endpoint.read(&mut BytesMut::with_capacity(1)).await?;
        let source = rig.endpoint.source().context("the kernel refused the endpoint's socket")?;
        ensure!(path == Path::Ingress || source.is_local_to(key), "the endpoint's own socket was not recognised");
        ensure!(path == Path::Ingress || source.admit(), "the endpoint's own socket was not admitted");
        Ok((rig, server, reader?))
    }

    /// Announces the client of the next response.
    pub(super) fn announce(&self) {
        self.endpoint.announce(Some(self.target.key));
    }

    /// Delivers a body, through the kernel as far as it takes it.
    pub(super) async fn deliver(&mut self, framing: Framing) -> (End, Account) {
        self.deliver_to(framing, None).await
    }

    /// Like [`deliver`](Self::deliver), with a copy of what `tee` wants.
    pub(super) async fn deliver_to(&mut self, framing: Framing, tee: Option<&RefCell<Tee>>) -> (End, Account) {
        let source = self.endpoint.source();
        let mut session = Session::new(self.path, self.target, framing, source);
        // Without a ring nothing is kept, which the case then finds.
        if tee.is_some() && source.is_some_and(|source| source.make_ring().is_ok()) {
            session.tee = tee;
        }
        session.idle = Some(PATIENCE);
        let mut delivery = Delivery::new(&mut self.client, &mut self.endpoint, session, BytesMut::new());
        (delivery.run().await, std::mem::take(&mut delivery.session.account))
    }

    /// Bytes that the kernel has passed to user space.
    pub(super) fn passed(&self) -> u64 {
        self.endpoint.source().map_or(0, Source::passed)
    }
}

/// `len` bytes of the pattern, starting at position `from`.
pub(super) fn pattern(from: usize, len: usize) -> Vec<u8> {
    const WORD: usize = size_of::<u64>();
    let mut bytes = Vec::with_capacity(len + 2 * WORD);
    // By words: the self-test of a debug build spends its time here.
    for word in from / WORD..(from + len).div_ceil(WORD) {
        bytes.extend_from_slice(&(word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    }
    bytes.drain(..from % WORD);
    bytes.truncate(len);
    bytes
}

pub(super) fn compare(got: &[u8], want: &[u8]) -> Result<()> {
    // Compares as a whole first: byte by byte takes a debug build on an emulated processor seconds.
    if got == want {
        return Ok(());
    }
    if let Some(at) = got.iter().zip(want).position(|(got, want)| got != want) {
        bail!("byte {at} of {} is wrong", want.len());
    }
    bail!("{} bytes of {} arrived", got.len(), want.len())
}
