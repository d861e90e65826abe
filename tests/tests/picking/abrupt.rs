//! A test endpoint that decides at the first byte of each request how to treat it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

pub(crate) enum Act {
    /// 200 with the body `ok`.
    Answer,
    /// Like `Answer`; then the connection disappears silently, as when its machine restarts: the next bytes get a reset that
    /// acknowledges nothing.
    AnswerAndVanish,
    /// The connection closes after the whole request.
    Close,
    /// The connection is reset after the whole request.
    Reset,
    /// The connection closes at the request's first bytes, so that the rest is answered by a reset.
    CloseEarly,
    /// One byte of a response, then a close.
    Begin,
    /// Silence.
    Silence,
}

#[derive(Clone, Copy)]
pub(crate) struct Turn {
    /// The connection's number, from 1.
    pub(crate) connection: u64,
    /// The request's number on its connection, from 1.
    pub(crate) request: u64,
}

/// Stops with the test.
pub(crate) struct Abrupt {
    pub(crate) addr: SocketAddr,
    requests: Arc<Mutex<Vec<Instant>>>,
}

impl Abrupt {
    pub(crate) async fn start(act: impl Fn(Turn) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (act, requests) = (Arc::new(act), Arc::<Mutex<Vec<Instant>>>::default());
        let begun = Arc::clone(&requests);
        tokio::spawn(async move {
            for connection in 1.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (act, begun) = (Arc::clone(&act), Arc::clone(&begun));
                tokio::spawn(async move {
                    let act = |request| {
                        begun.lock().push(Instant::now());
                        act(Turn { connection, request })
                    };
                    let _ = serve(stream, addr, act).await;
                });
            }
        });
        Self { addr, requests }
    }

    /// Requests that have begun, answered or not.
    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().len()
    }

    /// When the requests began.
    pub(crate) fn begun(&self) -> Vec<Instant> {
        self.requests.lock().clone()
    }
}

async fn serve(mut stream: TcpStream, addr: SocketAddr, act: impl Fn(u64) -> Act) -> std::io::Result<()> {
    let answer = format!("HTTP/1.1 200 OK\r\nx-served-by: {addr}\r\ncontent-length: 2\r\n\r\nok");
    for request in 1.. {
        let mut bytes = vec![0; 1];
        if stream.peek(&mut bytes).await? == 0 {
            break;
        }
        let act = act(request);
        if matches!(act, Act::CloseEarly) {
            break;
        }
        whole(&mut stream).await?;
        match act {
            Act::Answer => stream.write_all(answer.as_bytes()).await?,
            Act::AnswerAndVanish => {
                stream.write_all(answer.as_bytes()).await?;
                // A socket in repair mode closes silently (tcp(7), TCP_REPAIR).
                nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::TcpRepair, &1)?;
                break;
            }
            Act::Close | Act::CloseEarly => break,
            Act::Reset => {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                break;
            }
            Act::Begin => {
                stream.write_all(b"H").await?;
                break;
            }
            Act::Silence => std::future::pending().await,
        }
    }
    Ok(())
}

/// Reads one request and its body, if it has a Content-Length.
pub(crate) async fn whole(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|end| end == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..at]).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.trim().parse().expect("a length"));
            if bytes.len() >= at + 4 + length {
                return Ok(());
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}
