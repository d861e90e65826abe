//! A connection that has become something else (101 Switching Protocols): bytes both ways, in user space, until both sides
//! have ended theirs.
//!
//! The end of one direction is passed on and leaves the other as it is. An error on either side breaks both off: the caller has
//! made sure that each sees a reset.

use std::{cell::Cell, io, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::Instant,
};

use super::{Account, End, within};
use crate::{
    client::ClientSocket,
    endpoint::connection::{EndpointConnection, Reader},
    kernel::socket::monotonic_ns,
};

const READ: usize = 16 * 1024;

pub struct Tunnel<'a> {
    pub client: &'a mut ClientSocket,
    pub endpoint: &'a mut EndpointConnection,
    /// The response head.
    pub lead: BytesMut,
    /// Read behind it.
    pub pending: BytesMut,
    /// Longest time without a byte either way.
    pub idle: Option<Duration>,
    /// `relayed` is what went to the client.
    pub account: Account,
}

/// Why a direction broke.
enum Broken {
    Client,
    Endpoint,
}

impl Tunnel<'_> {
    pub async fn run(&mut self) -> End {
        let first = monotonic_ns();
        self.lead.extend_from_slice(&self.pending);
        if let Err(end) = within(self.idle, self.client.write_all(&self.lead)).await {
            return end;
        }
        let (active, up, down) = (Cell::new(Instant::now()), Cell::new(0), Cell::new(self.pending.len() as u64));
        let (mut read, early, mut write) = self.client.split();
        let Ok((from, mut to)) = self.endpoint.split() else { return End::Broken };
        let note = |count: &Cell<u64>, n: usize| {
            active.set(Instant::now());
            count.set(count.get() + n as u64);
        };
        let both = async {
            let up = client_to_endpoint(&mut read, early, &mut to, |n| note(&up, n));
            let down = endpoint_to_client(from, &mut write, |n| note(&down, n));
            tokio::try_join!(up, down)
        };
        let end = tokio::select! {
            biased;
            ended = both => match ended {
                Ok(_) => End::Complete { reusable: false },
                Err(Broken::Client) => End::ClientGone,
                Err(Broken::Endpoint) => End::Broken,
            },
            () = unused(&active, self.idle) => End::Idle,
        };
        self.account.stamp(first, monotonic_ns());
        (self.account.relayed, self.account.upstream) = (down.get(), up.get());
        end
    }
}

async fn client_to_endpoint(
    client: &mut (impl AsyncRead + Unpin),
    mut early: BytesMut,
    endpoint: &mut (impl AsyncWrite + Unpin),
    note: impl Fn(usize),
) -> Result<(), Broken> {
    loop {
        if !early.is_empty() {
            note(early.len());
            endpoint.write_all(&early).await.map_err(|_| Broken::Endpoint)?;
            early.clear();
        }
        early.reserve(READ);
        if client.read_buf(&mut early).await.map_err(|_| Broken::Client)? == 0 {
            return endpoint.shutdown().await.map_err(|_| Broken::Endpoint);
        }
    }
}

async fn endpoint_to_client(
    mut endpoint: Reader<'_>,
    client: &mut (impl AsyncWrite + Unpin),
    note: impl Fn(usize),
) -> Result<(), Broken> {
    let mut buf = BytesMut::new();
    let written = |done: io::Result<()>| done.map_err(|_| Broken::Client);
    loop {
        buf.reserve(READ);
        if endpoint.read(&mut buf).await.map_err(|_| Broken::Endpoint)? == 0 {
            return written(client.shutdown().await);
        }
        note(buf.len());
        written(client.write_all(&buf).await)?;
        written(client.flush().await)?;
        buf.clear();
    }
}

/// Resolves when nothing has moved for the idle time.
async fn unused(active: &Cell<Instant>, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    while active.get().elapsed() < idle {
        tokio::time::sleep_until(active.get() + idle).await;
    }
}
