//! The new agent's side of a takeover.

use std::{io, os::unix::net::UnixStream, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::Uid,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream as AsyncUnixStream,
    time::timeout,
};

use super::{
    Passed, Role,
    message::{Malformed, ReceivedLines, SOCKETS, TakeoverLine, VERSION},
};
use crate::kernel::descriptors;

/// Time limit for each answer of the running agent.
const ANSWER: Duration = Duration::from_secs(10);
/// Size of one read, in bytes.
const READ: usize = 256;

/// A takeover from a running agent, which serves until [`ready`](Self::ready).
#[derive(Debug)]
pub struct Taking {
    stream: UnixStream,
    lines: ReceivedLines,
    /// The running agent.
    pub pid: i32,
    pub program: String,
}

/// Gets the sockets of the agent that answers at `path`; `None` if no agent does. Blocks for at most some seconds.
pub fn ask(path: &Path) -> Result<Option<(Taking, Vec<Passed>)>> {
    use io::ErrorKind::{ConnectionRefused, NotFound};

    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ConnectionRefused | NotFound) => return Ok(None),
        Err(error) => bail!("cannot ask for the sockets of the running agent at {}: {error}", path.display()),
    };
    take(stream).with_context(|| format!("the agent at {} did not hand its sockets over", path.display())).map(Some)
}

fn take(stream: UnixStream) -> Result<(Taking, Vec<Passed>)> {
    let peer = getsockopt(&stream, PeerCredentials)?;
    let own = Uid::effective();
    ensure!(peer.uid() == own.as_raw(), "it runs as uid {}, and this one as uid {own}", peer.uid());
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let hello = TakeoverLine::Hello { version: VERSION, program: env!("CARGO_PKG_VERSION").to_owned() };
    io::Write::write_all(&mut &stream, &hello.encode()).context("cannot write to it")?;
    let (mut lines, mut fds) = (ReceivedLines::default(), Vec::new());
    let mut next = |fds: &mut Vec<_>| -> Result<TakeoverLine> {
        loop {
            if let Some(message) = lines.next()? {
                return Ok(message);
            }
            let mut bytes = [0; READ];
            let read = descriptors::receive(&stream, &mut bytes, fds).context("cannot read from it")?;
            ensure!(read > 0, Malformed::End);
            ensure!(fds.len() <= SOCKETS, "it sent more than {SOCKETS} descriptors");
            lines.push(&bytes[..read]);
        }
    };
    let (count, program) = match next(&mut fds)? {
        TakeoverLine::Sockets { count, program } => (count, program),
        TakeoverLine::Refused(reason) => bail!("{reason}"),
        other => bail!("expected `sockets`, found `{other}`"),
    };
    let mut described = Vec::new();
    for _ in 0..count {
        match next(&mut fds)? {
            TakeoverLine::Socket { role, held, address } => described.push((role, held, address)),
            other => bail!("expected `socket`, found `{other}`"),
        }
    }
    ensure!(fds.len() == count, "it sent {} descriptors, expected {count}", fds.len());
    let passed = described.into_iter().zip(fds).map(|((role, held, address), fd)| {
        let socket = descriptors::listener(fd).map_err(|what| anyhow::anyhow!("socket {role} is {what}"))?;
        let bound = socket.local_addr()?;
        ensure!(bound == address, "socket {role} is bound to {bound}, expected {address}");
        Ok(Passed { role, held, socket })
    });
    let passed = passed.collect::<Result<_>>()?;
    Ok((Taking { stream, lines, pid: peer.pid(), program }, passed))
}

impl Taking {
    /// Tells the running agent that this one accepts at the sockets of `roles`. Returns when the running one has begun to drain.
    pub async fn ready(self, roles: Vec<Role>) -> Result<()> {
        let Self { stream, mut lines, .. } = self;
        stream.set_nonblocking(true)?;
        let mut stream = AsyncUnixStream::from_std(stream)?;
        let answered = timeout(ANSWER, async {
            stream.write_all(&TakeoverLine::Ready(roles).encode()).await?;
            loop {
                if let Some(message) = lines.next()? {
                    return Ok(message);
                }
                let mut bytes = [0; READ];
                let read = stream.read(&mut bytes).await?;
                ensure!(read > 0, Malformed::End);
                lines.push(&bytes[..read]);
            }
        });
        match answered.await.context("it did not answer in time")?? {
            TakeoverLine::Done => Ok(()),
            other => bail!("expected `done`, found `{other}`"),
        }
    }

    /// Resolves when the running agent has ended or closed the conversation. Cancel-safe.
    pub fn ended(&self) -> impl Future<Output = ()> + use<> {
        let watched = self.stream.try_clone().and_then(|stream| {
            stream.set_nonblocking(true)?;
            AsyncUnixStream::from_std(stream)
        });
        async move {
            match watched {
                // The running agent sends nothing until `ready`.
                Ok(stream) => drop(stream.readable().await),
                Err(_) => std::future::pending().await,
            }
        }
    }
}
