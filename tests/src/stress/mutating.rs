//! An endpoint that overwrites chunk sizes in the pages that it has sent with `sendfile`. Whatever an agent parsed before, its
//! client must get either the same bytes or a visible break, and the next response on that connection must be exact.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::thread::{JoinHandle, park_timeout};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile64;
use socket2::SockRef;

use super::PATIENCE;
use super::exchange::Short;
use crate::client::Pace;
use crate::content::Alphabet;
use crate::{BodyEnd, Checker, Client, Random, Request};

/// How long the endpoint waits for the next request: an agent that parsed an overwritten size waits for more of the message.
const NEXT: Duration = Duration::from_millis(100);
const LARGEST_CHUNK: u64 = 30_000;
const MOST_CHUNKS: u64 = 12;
/// A size that no chunk has, in as many digits.
const WRONG_SIZE: &[u8] = b"fffff";

pub(super) struct Mutating {
    pub(super) addr: SocketAddr,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Mutating {
    pub(super) fn start(seed: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (addr, accepting) = (listener.local_addr()?, listener.try_clone()?);
        let thread = std::thread::Builder::new().name("mutating".to_owned()).spawn(move || {
            let mut random = Random::new(seed);
            // Ends when the listener is shut down.
            while let Ok((stream, _)) = accepting.accept() {
                let random = Random::new(random.below(u64::MAX));
                // The agent's close, or the time for the next request.
                std::thread::spawn(move || serve(&stream, random));
            }
        })?;
        Ok(Self { addr, listener, thread: Some(thread) })
    }
}

impl Drop for Mutating {
    fn drop(&mut self) {
        let _ = SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The target `/N` is answered with the stream N: chunked and mutated if N is odd, else with its length.
fn serve(mut stream: &TcpStream, mut random: Random) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream);
    loop {
        let Some(id) = request(&mut requests)? else { return Ok(()) };
        if id % 2 == 1 {
            mutated(stream, id, &mut random)?;
            stream.set_read_timeout(Some(NEXT))?;
        } else {
            let body = Alphabet::Text.bytes(id, 0, size(id) as usize);
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes())?;
            stream.write_all(&body)?;
            stream.set_read_timeout(None)?;
        }
    }
}

fn request(lines: &mut BufReader<&TcpStream>) -> io::Result<Option<u64>> {
    let mut id = None;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if line == "\r\n" {
            return Ok(id);
        }
        if id.is_none() {
            id = line.split(['/', ' ']).nth(2).and_then(|number| number.parse().ok());
        }
    }
}

/// The length of stream `id`.
fn size(id: u64) -> u64 {
    Random::new(id).below(LARGEST_CHUNK * MOST_CHUNKS)
}

/// Sends stream `id` in chunks, and overwrites the sizes of those that have been sent.
fn mutated(mut stream: &TcpStream, id: u64, random: &mut Random) -> io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
    park_timeout(Duration::from_micros(random.below(2000)));
    let (mut file, sizes) = chunks(id, random)?;
    let len = file.metadata()?.len() as i64;
    let (mut offset, mut overwritten) = (0, 0);
    while offset < len {
        let part = (1 + random.below(100_000)).min((len - offset) as u64);
        sendfile64(stream, &file, Some(&mut offset), part as usize)?;
        if random.one_in(2) {
            park_timeout(Duration::from_micros(random.below(1500)));
            while sizes.get(overwritten).is_some_and(|at| (at + WRONG_SIZE.len() as u64) < offset as u64) {
                file.write_all_at(WRONG_SIZE, sizes[overwritten])?;
                overwritten += 1;
            }
        }
    }
    file.flush()
}

/// A file with the whole message body, and where its chunk sizes are.
fn chunks(id: u64, random: &mut Random) -> io::Result<(File, Vec<u64>)> {
    let (mut rest, mut at, mut body, mut sizes) = (size(id), 0, Vec::new(), Vec::new());
    loop {
        let chunk = rest.min(1 + random.below(LARGEST_CHUNK));
        sizes.push(body.len() as u64);
        write!(body, "{chunk:05x}\r\n")?;
        body.extend_from_slice(&Alphabet::Text.bytes(id, at, chunk as usize));
        body.extend_from_slice(b"\r\n");
        if chunk == 0 {
            break;
        }
        (rest, at) = (rest - chunk, at + chunk);
    }
    let mut file = File::from(memfd_create(c"chunks", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&body)?;
    Ok((file, sizes))
}

/// Requests mutated streams and plain ones in turn, and passes the result of each to `done`: whether it was complete, and its bytes.
pub(super) async fn calls(
    addr: SocketAddr,
    mut random: Random,
    until: Instant,
    mut done: impl FnMut(Result<(bool, u64)>),
) {
    let mut kept = None;
    while Instant::now() < until {
        let id = random.below(u64::MAX / 2) * 2;
        // At most half a second: a slower client would meet the time limit by itself.
        let bytes = (1 + size(id + 1) / 250 + random.below(100_000)) as usize;
        let pace = random.pick(&[Pace::Fast, Pace::Slow { bytes, tick: Duration::from_millis(1) }]);
        let mut client = match kept.take() {
            Some(client) => client,
            None => {
                let rcvbuf = random.pick(&[None, Some(4096), Some(64 << 10)]);
                match Client::connect_with(addr, rcvbuf).await {
                    Ok(client) => client,
                    Err(error) => return done(Err(error)),
                }
            }
        };
        match bounded(exchange(&mut client, id + 1, pace, true)).await {
            Ok((false, bytes)) => done(Ok((false, bytes))),
            Ok((true, bytes)) => {
                done(Ok((true, bytes)));
                let next = bounded(exchange(&mut client, id, Pace::Fast, false)).await;
                if next.is_ok() {
                    kept = Some(client);
                }
                done(next.context("the response after a mutated one"));
            }
            Err(error) => done(Err(error.context("a mutated response"))),
        }
    }
}

async fn bounded(exchange: impl Future<Output = Result<(bool, u64)>>) -> Result<(bool, u64)> {
    tokio::time::timeout(PATIENCE, exchange).await.context("it does not end")?
}

/// Requests one stream; returns whether it was complete, and its bytes. Only a mutated one may be incomplete.
async fn exchange(client: &mut Client, id: u64, pace: Pace, mutated: bool) -> Result<(bool, u64)> {
    client.send(&Request::get(&format!("/{id}"))).await?;
    let head = client.head().await?;
    // An endpoint that waits no longer closes a connection that the agent has kept.
    if mutated && head.status == 502 {
        return Ok((false, 0));
    }
    ensure!(head.status == 200, "status {}", head.status);
    let (mut checker, mut wrong) = (Checker::text(id), None);
    let read = client.read_body(pace, |bytes| {
        if wrong.is_none() {
            wrong = checker.feed(bytes).err();
        }
        Ok(())
    });
    let read = read.await?;
    if read.end != BodyEnd::Complete && mutated {
        // The agent may have read what was overwritten, as content of a longer chunk.
        return Ok((false, read.wire));
    }
    wrong.map_or(Ok(()), Err)?;
    ensure!(read.end == BodyEnd::Complete, "{:?} after {} bytes", read.end, read.len);
    ensure!(read.len == size(id), Short { bytes: read.len, of: size(id) });
    Ok((true, read.wire))
}
