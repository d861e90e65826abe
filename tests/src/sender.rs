//! An HTTP/1.1 endpoint on plain threads that hands its responses to the kernel by a chosen kind of call: on the path `local`, the
//! endpoint's calls and its handling of a full socket matter.
//!
//! Requests are [`Plan`]s, of which framing, size, content and chunks apply. A sender pauses now and then, so that the agent
//! catches up and arms the flow. Counters reveal waits for a writable socket that never end, and busy retries.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use socket2::SockRef;

use crate::Plan;
use crate::namespace::Namespace;
use message::Messages;
use turn::Turn;
pub use turn::set_zerocopy;

mod message;
mod turn;

/// What a sender does when the socket is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// It blocks in the call.
    Blocking,
    /// It retries whenever the socket is writable.
    LevelTriggered,
    /// It retries only when notified that the socket has become writable.
    EdgeTriggered,
}

/// The calls of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// `send`, this many bytes at a time.
    Send(usize),
    /// `writev` of many small pieces; for a chunk its size, its bytes and its end.
    Vectored,
    /// `sendfile`, and `send` for chunk framing.
    SendFile,
    /// `send` with `MSG_ZEROCOPY`.
    ZeroCopy,
    /// `send`, by this many threads taking turns.
    Turns(usize),
}

#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    pub waits: Waits,
    pub calls: Calls,
    /// Sets `SO_ZEROCOPY` on the listener, so that connections are accepted with it.
    pub zerocopy_from_the_start: bool,
    /// Where it listens; the caller's namespace by default.
    pub namespace: Option<Arc<Namespace>>,
}

impl Options {
    #[must_use]
    pub fn new(waits: Waits, calls: Calls) -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            waits,
            calls,
            zerocopy_from_the_start: false,
            namespace: None,
        }
    }
}

/// A connection to the sender.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    pub peer: SocketAddr,
    /// The cookie of the sender's socket (SO_COOKIE).
    pub cookie: u64,
}

#[derive(Default)]
struct Shared {
    /// Calls that sent something, and calls that would have blocked.
    sent: AtomicU64,
    refused: AtomicU64,
    /// Waits for a writable socket that timed out.
    stalled: AtomicU64,
    /// Calls with `MSG_ZEROCOPY`, and those reported complete by the kernel.
    zerocopy: AtomicU64,
    completed: AtomicU64,
    accepted: Mutex<Vec<(Accepted, TcpStream)>>,
}

/// A running sender. Dropping it closes everything.
pub struct Sender {
    pub addr: SocketAddr,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Sender {
    /// Returns once it accepts connections.
    pub fn start(options: Options) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let listener = match &options.namespace {
            Some(namespace) => namespace.run(|| TcpListener::bind(options.listen))?,
            None => TcpListener::bind(options.listen),
        };
        let listener = listener.with_context(|| format!("listening on {}", options.listen))?;
        if options.zerocopy_from_the_start {
            turn::set_zerocopy(&listener)?;
        }
        let addr = listener.local_addr()?;
        let (accepting, server) = (listener.try_clone()?, Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("sender".to_owned()).spawn(move || {
            // Ends when the listener is shut down.
            while let Ok((stream, peer)) = accepting.accept() {
                let (server, options) = (Arc::clone(&server), options.clone());
                let Ok(cookie) = SockRef::from(&stream).cookie() else { continue };
                let Ok(handle) = stream.try_clone() else { continue };
                server.accepted.lock().push((Accepted { peer, cookie }, handle));
                std::thread::spawn(move || {
                    // An error is the peer's close, or is visible in the counters.
                    let _ = serve(&stream, &options, &server);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        })?;
        Ok(Self { addr, listener, thread: Some(thread), shared })
    }

    #[must_use]
    pub fn accepted(&self) -> Vec<Accepted> {
        self.shared.accepted.lock().iter().map(|(accepted, _)| *accepted).collect()
    }

    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn stalled(&self) -> u64 {
        self.shared.stalled.load(Ordering::Relaxed)
    }

    /// Calls with `MSG_ZEROCOPY`, and how many of them are completed.
    #[must_use]
    pub fn zerocopy(&self) -> (u64, u64) {
        (self.shared.zerocopy.load(Ordering::Relaxed), self.shared.completed.load(Ordering::Relaxed))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for (_, stream) in self.shared.accepted.lock().iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Serves requests until either side ends the connection.
fn serve(stream: &TcpStream, options: &Options, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let turn = Turn::new(stream, options, shared)?;
    let mut buffer = Vec::new();
    loop {
        let plan = loop {
            if let Some((plan, len)) = request(&buffer)? {
                buffer.drain(..len);
                break plan;
            }
            let mut piece = [0; 4096];
            match turn.read(&mut piece)? {
                0 => return Ok(()),
                n => buffer.extend_from_slice(&piece[..n]),
            }
        };
        let mut messages = Messages::new(&plan, options.calls)?;
        turn.pause()?;
        turn.send(&mut messages)?;
        turn.complete()?;
    }
}

/// The plan of the first request, and its length; `None` while incomplete. Requests have no bodies.
fn request(bytes: &[u8]) -> io::Result<Option<(Plan, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(len) = request.parse(bytes).map_err(io::Error::other)? else { return Ok(None) };
    let plan = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case("x-test-plan"));
    let plan = plan.ok_or_else(|| io::Error::other("request without a plan"))?;
    Ok(Some((serde_json::from_slice(plan.value)?, len)))
}
