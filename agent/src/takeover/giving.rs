//! The running agent's side of a takeover: answers at `process.upgrade_socket`, and reports the new agent that is ready.

use std::{
    fs::Permissions,
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::unistd::Uid;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

use super::{
    Loan, Passed, Role,
    message::{self, Malformed, ReceivedLines, TakeoverLine},
};
use crate::kernel::descriptors;

/// Time limit for the first line and for each write.
const PROMPT: Duration = Duration::from_secs(5);
/// Maximum number of conversations, all but one of which are refused at once.
const CONVERSATIONS: usize = 8;
/// Pause after a failed `accept`.
const PAUSE: Duration = Duration::from_millis(100);

/// A new agent that is ready and accepts at the sockets of `roles`.
#[derive(Debug)]
pub struct Successor {
    pub roles: Vec<Role>,
    pub pid: Option<i32>,
    pub program: String,
    /// Answers it; dropped, the conversation ends without an answer.
    pub done: oneshot::Sender<()>,
}

/// The socket at `process.upgrade_socket`, not yet answering.
#[derive(Debug)]
pub struct UpgradeSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
    /// Where it is bound until [`publish`](Self::publish).
    hidden: PathBuf,
}

impl UpgradeSocket {
    /// Binds the socket beside `path`, which may be another agent's.
    pub fn bind(path: &Path) -> Result<Self> {
        let mut hidden = path.to_owned().into_os_string();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let bind = || {
            // Left by a process of this number that was killed.
            let _ = std::fs::remove_file(&hidden);
            let listener = std::os::unix::net::UnixListener::bind(&hidden)?;
            std::fs::set_permissions(&hidden, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            io::Result::Ok(listener)
        };
        let listener =
            bind().with_context(|| format!("cannot listen on process.upgrade_socket, {}", path.display()))?;
        Ok(Self { listener, path: path.to_owned(), hidden })
    }

    /// Puts the socket at its path, in place of another agent's, and answers there. `sockets` yields what is handed over.
    pub fn publish(
        self,
        sockets: impl Fn() -> io::Result<(Vec<Passed>, Loan)> + Send + Sync + 'static,
    ) -> io::Result<Giving> {
        std::fs::rename(&self.hidden, &self.path)?;
        let file = std::fs::metadata(&self.path).map(|file| (file.dev(), file.ino()))?;
        let listener = UnixListener::from_std(self.listener.try_clone()?)?;
        let (ready, successors) = mpsc::channel(1);
        let conversations = Conversations { sockets: Arc::new(sockets), ready, turn: Arc::new(Semaphore::new(1)) };
        let task = tokio::spawn(answer(listener, conversations));
        Ok(Giving { path: self.path.clone(), file, successors, task })
    }
}

impl Drop for UpgradeSocket {
    fn drop(&mut self) {
        // Nothing is there after `publish`.
        let _ = std::fs::remove_file(&self.hidden);
    }
}

/// The published socket. Dropping it stops answering and removes the socket, unless another agent's is in its place.
pub struct Giving {
    path: PathBuf,
    file: (u64, u64),
    successors: mpsc::Receiver<Successor>,
    task: tokio::task::JoinHandle<()>,
}

impl Giving {
    /// The next agent that is ready. Cancel-safe.
    pub async fn successor(&mut self) -> Successor {
        match self.successors.recv().await {
            Some(successor) => successor,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Giving {
    fn drop(&mut self) {
        self.task.abort();
        if std::fs::metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[derive(Clone)]
struct Conversations {
    sockets: Arc<dyn Fn() -> io::Result<(Vec<Passed>, Loan)> + Send + Sync>,
    ready: mpsc::Sender<Successor>,
    /// Held by the conversation that takes the sockets.
    turn: Arc<Semaphore>,
}

/// Answers new agents. Never returns.
async fn answer(listener: UnixListener, conversations: Conversations) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        if open.fetch_add(1, Relaxed) >= CONVERSATIONS {
            open.fetch_sub(1, Relaxed);
            continue;
        }
        let (conversations, open) = (conversations.clone(), Arc::clone(&open));
        tokio::spawn(async move {
            if let Err(error) = conversations.converse(stream).await {
                tracing::warn!(error = format!("{error:#}"), "takeover by another agent failed, continuing to serve");
            }
            open.fetch_sub(1, Relaxed);
        });
    }
}

impl Conversations {
    async fn converse(&self, mut stream: UnixStream) -> Result<()> {
        let mut lines = ReceivedLines::default();
        // Also read before a refusal: unread bytes would turn the close into a reset, which destroys the reason.
        let hello = timeout(PROMPT, next(&mut stream, &mut lines)).await.context("nothing arrived in time")??;
        let peer = stream.peer_cred()?;
        let own = Uid::effective().as_raw();
        if peer.uid() != own {
            let reason = format!("the running agent runs as uid {own}, and this one as uid {}", peer.uid());
            return refuse(&mut stream, reason).await;
        }
        if let Some(reason) = message::mismatch(&hello) {
            return refuse(&mut stream, reason).await;
        }
        let TakeoverLine::Hello { program, .. } = hello else { bail!("expected a greeting, found `{hello}`") };
        let Ok(_turn) = self.turn.try_acquire() else {
            return refuse(&mut stream, "another agent is already taking over".to_owned()).await;
        };
        // Kept until the conversation ends, whatever else this agent does meanwhile.
        let (sockets, loan) = match (self.sockets)() {
            Ok(lent) => lent,
            Err(error) => return refuse(&mut stream, error.to_string()).await,
        };
        tracing::info!(pid = peer.pid(), version = program, sockets = sockets.len(), "another agent is taking over");
        timeout(PROMPT, send(&mut stream, &sockets)).await.context("it did not read in time")??;
        drop(sockets);
        let roles = match next(&mut stream, &mut lines).await.context("it is not ready")? {
            TakeoverLine::Ready(roles) => roles,
            other => bail!("expected `ready`, found `{other}`"),
        };
        loan.keep();
        let (done, is_done) = oneshot::channel();
        let successor = Successor { roles, pid: peer.pid(), program, done };
        ensure!(self.ready.send(successor).await.is_ok() && is_done.await.is_ok(), "this agent stops already");
        write(&mut stream, &TakeoverLine::Done).await
    }
}

async fn refuse(stream: &mut UnixStream, reason: String) -> Result<()> {
    write(stream, &TakeoverLine::Refused(reason.clone())).await?;
    bail!("refused: {reason}")
}

async fn write(stream: &mut UnixStream, message: &TakeoverLine) -> Result<()> {
    timeout(PROMPT, stream.write_all(&message.encode())).await.context("it did not read in time")??;
    Ok(())
}

async fn send(stream: &mut UnixStream, sockets: &[Passed]) -> Result<()> {
    let program = env!("CARGO_PKG_VERSION").to_owned();
    write(stream, &TakeoverLine::Sockets { count: sockets.len(), program }).await?;
    for Passed { role, held, socket } in sockets {
        let message = TakeoverLine::Socket { role: *role, held: *held, address: socket.local_addr()? }.encode();
        let sent =
            stream.async_io(Interest::WRITABLE, || descriptors::send(&*stream, &message, socket.as_fd())).await?;
        ensure!(sent == message.len(), "a message was cut short");
    }
    Ok(())
}

/// The next message.
async fn next(stream: &mut UnixStream, lines: &mut ReceivedLines) -> Result<TakeoverLine> {
    loop {
        if let Some(message) = lines.next()? {
            return Ok(message);
        }
        let mut bytes = [0; 256];
        let read = stream.read(&mut bytes).await?;
        ensure!(read > 0, Malformed::End);
        lines.push(&bytes[..read]);
    }
}
