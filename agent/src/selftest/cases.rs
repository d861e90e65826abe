//! The self-test cases: what the known bugs of sockmap redirects, or a bug in our rules, would show on this kernel.
//!
//! The cases are the same on each path. What a path does not take goes to the next, so bytes are summed over all paths,
//! and each case checks that its own path has carried some.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::Write as _,
    net::Ipv4Addr,
    os::unix::fs::FileExt as _,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::BytesMut;
use futures_util::FutureExt as _;
use http::{HeaderValue, header::CONTENT_TYPE};
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    sendfile::sendfile,
};
use penstock_common::{framing::Framing, path::Path, slot::stop, tail::TAIL};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{TcpListener, TcpSocket},
    sync::oneshot,
};

use super::{
    Case,
    rig::{BUFFER, Rig, compare, pattern},
};
use crate::{
    budget::Budget,
    client::close::Linger,
    config::ResponseToPicker,
    deliver::End,
    steer::WorkerSteering,
    tee::{BodyFacts, Tee},
};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a stalled reader: every byte, and memory stays flat",
        run: |steering, path| stalled_reader(steering, path).boxed_local(),
    },
    Case { name: "a chunked stream in small pieces", run: |steering, path| small_chunks(steering, path).boxed_local() },
    Case {
        name: "the last events of a stream are kept",
        run: |steering, path| last_events(steering, path).boxed_local(),
    },
    Case {
        name: "bytes passed before the kernel takes over",
        run: |steering, path| passed_then_redirected(steering, path).boxed_local(),
    },
    Case {
        name: "an orderly close after the last byte",
        run: |steering, path| end_by_fin(steering, path).boxed_local(),
    },
    Case {
        name: "chunk syntax in pages that the sender can still write",
        run: |steering, path| shared_syntax(steering, path).boxed_local(),
    },
    Case {
        name: "a socket whose peer has closed is refused",
        run: |steering, path| half_closed_is_refused(steering, path).boxed_local(),
    },
];

const BODY: usize = 2 << 20;
/// Bytes per write; a send buffer holds several.
const PIECE: usize = 32 * 1024;
/// A sender without progress for this long is stuck. Only this thread and the kernel's receive path are involved.
const QUIET: Duration = Duration::from_millis(10);
/// SO_SNDBUF of the server and SO_RCVBUF of the reader, before the kernel doubles it.
const FAR_BUFFER: usize = 32 * 1024;
/// Maximum bytes in transit while the reader stalls: both of our buffers, those of the far ends, and what one turn of
/// user space holds. Without the room check it would be the whole body.
const IN_TRANSIT: usize = 2 * BUFFER as usize + 4 * FAR_BUFFER + (256 << 10);
const _: () = assert!(IN_TRANSIT < BODY / 2);

async fn stalled_reader(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, path).await?;
    socket2::SockRef::from(&server).set_send_buffer_size(FAR_BUFFER)?;
    socket2::SockRef::from(&reader).set_recv_buffer_size(FAR_BUFFER)?;
    let body = pattern(0, BODY);
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
        socket2::SockRef::from(&reader).set_recv_buffer_size(BODY)?;
        reader.read_exact(&mut got).await.map(drop)
    };
    let release = async {
        // The reader starts when the sender makes no more progress.
        let mut before = 0;
        while sent.get() < BUFFER as usize / 2 || sent.get() != before {
            before = sent.get();
            tokio::time::sleep(QUIET).await;
        }
        let _ = start_reading.send(());
        sent.get()
    };
    let ((end, account), written, read, in_transit) =
        tokio::join!(rig.deliver(Framing::length(BODY as u64)), write, read, release);
    written?;
    read?;
    ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
    ensure!(account.carried(path) > 0, "the kernel redirected nothing");
    ensure!(account.stops[stop::ROOM as usize] > 0, "the room check did not stop the kernel");
    ensure!(in_transit <= IN_TRANSIT, "{in_transit} bytes were sent to a reader that reads nothing");
    ensure!(
        account.steered + account.local + account.relayed == BODY as u64,
        "the account does not add up: {account:?}"
    );
    compare(&got, &body)
}

async fn small_chunks(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, path).await?;
    let mut wire = Vec::new();
    for n in 1..=64usize {
        wire.extend_from_slice(format!("{n:x};n=v\r\n").as_bytes());
        wire.extend(pattern(n * 64, n));
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
    ensure!(account.carried(path) > 0, "the kernel redirected nothing");
    compare(&got, &wire)
}

/// The kernel keeps the end of what it redirects, in a ring that the stream fills several times.
async fn last_events(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    const EVENTS: usize = 200;
    let (mut rig, mut server, mut reader) = Rig::new(steering, path).await?;
    let events: Vec<_> = (0..EVENTS).map(|n| format!("data: {n:0>width$}\n\n", width = 1 + n % 97)).collect();
    let mut wire: Vec<_> = events.iter().map(|event| format!("{:x}\r\n{event}\r\n", event.len())).collect();
    wire.push("0\r\n\r\n".to_owned());
    let headers = [(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"))].into_iter().collect();
    let facts = BodyFacts { headers: &headers, length: None, streams: true };
    let tee = RefCell::new(Tee::new(ResponseToPicker::Usage, &facts, &Budget::unlimited()).context("no end is kept")?);
    let mut got = vec![0; wire.iter().map(String::len).sum()];
    let write = async {
        for piece in &wire {
            server.write_all(piece.as_bytes()).await?;
            tokio::task::yield_now().await;
        }
        std::io::Result::Ok(())
    };
    let ((end, account), written, read) =
        tokio::join!(rig.deliver_to(Framing::chunked(), Some(&tee)), write, reader.read_exact(&mut got));
    written?;
    read?;
    ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
    ensure!(account.carried(path) > 0, "the kernel redirected nothing");
    compare(&got, wire.concat().as_bytes())?;
    let body = events.concat();
    let (_, last) = body[body.len() - TAIL as usize..].split_once("\n\n").context("no event end")?;
    compare(&tee.into_inner().rest().pieces.concat(), [&events[0], last].concat().as_bytes()).context("what was kept")
}

/// Responses on a kept connection, one after the other: user space reads the passed head, the body begins while nothing
/// is armed, and the kernel takes over after what user space has read and written.
async fn passed_then_redirected(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    const ROUNDS: usize = 3;
    const HEAD: usize = 300;
    const PIECE: usize = 5000;
    const PIECES: usize = 12;
    let (mut rig, mut server, mut reader) = Rig::new(steering, path).await?;
    for round in 0..ROUNDS {
        let wire = pattern(round * 100_000, HEAD + PIECE * PIECES);
        let (head, body) = wire.split_at(HEAD);
        let before = rig.passed();
        rig.announce();

        server.write_all(head).await?;
        let mut read = BytesMut::with_capacity(HEAD);
        while read.len() < HEAD {
            ensure!(rig.endpoint.read(&mut read).await? > 0, "the stream ended in the head");
        }
        compare(&read, head).context("the head")?;
        server.write_all(&body[..PIECE]).await?;
        while rig.passed() < before + (HEAD + PIECE) as u64 {
            tokio::task::yield_now().await;
        }

        let mut got = vec![0; body.len()];
        let exchange = async {
            for (number, piece) in got.chunks_mut(PIECE).enumerate() {
                // The first piece has been sent already.
                if number > 0 {
                    server.write_all(&body[number * PIECE..][..PIECE]).await?;
                }
                reader.read_exact(piece).await?;
            }
            std::io::Result::Ok(())
        };
        let ((end, account), exchanged) = tokio::join!(rig.deliver(Framing::length(body.len() as u64)), exchange);
        exchanged?;
        ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
        ensure!(account.relayed >= PIECE as u64, "the passed bytes were not relayed");
        ensure!(account.carried(path) > 0, "the kernel redirected nothing after them");
        ensure!(
            account.steered + account.local + account.relayed == body.len() as u64,
            "the account does not add up: {account:?}"
        );
        compare(&got, body).with_context(|| format!("response {round}"))?;
    }
    Ok(())
}

async fn end_by_fin(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    let (mut rig, mut server, mut reader) = Rig::new(steering, path).await?;
    let body = pattern(0, 100_000);
    let mut got = Vec::new();
    let write = async {
        server.write_all(&body).await?;
        server.shutdown().await
    };
    let deliver = async {
        let outcome = rig.deliver(Framing::until_close()).await;
        // The reader closes as soon as it has everything.
        let _ = rig.client.close(Linger::default()).await;
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
    ensure!(
        account.steered + account.local + account.relayed == body.len() as u64,
        "the account does not add up: {account:?}"
    );
    compare(&got, &body)
}

/// The endpoint sends a file, and writes other chunk sizes into it once the agent considers the message complete. On
/// path `ingress` such a segment passes to user space, which keeps what it has parsed; on path `local` the kernel has
/// copied it.
async fn shared_syntax(steering: &Rc<WorkerSteering>, path: Path) -> Result<()> {
    let (mut rig, server, mut reader) = Rig::new(steering, path).await?;
    let wire = b"5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n";
    let mut file = File::from(memfd_create(c"body", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(wire)?;
    let send = async {
        loop {
            server.writable().await?;
            let sent = server.try_io(Interest::WRITABLE, || Ok(sendfile(&server, &file, Some(&mut 0), wire.len())?));
            match sent {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                sent => break sent,
            }
        }
    };
    let ((end, account), sent) = tokio::join!(rig.deliver(Framing::chunked()), send);
    ensure!(sent? == wire.len(), "the file was sent in part");
    ensure!(end == End::Complete { reusable: true }, "the delivery ended as {end:?}");
    ensure!(path == Path::Local || account.stops[stop::SHARED as usize] > 0, "the kernel redirected it");
    file.write_all_at(&[b'f'; 20], 0)?;
    let mut got = vec![0; wire.len()];
    reader.read_exact(&mut got).await?;
    compare(&got, wire)
}

/// The kernel programs would never see the end of such a stream, so user space has to carry it on either path.
async fn half_closed_is_refused(steering: &Rc<WorkerSteering>, _path: Path) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let socket = TcpSocket::new_v4()?;
    let source = steering.announce_source(&socket)?;
    let (endpoint, server) = tokio::join!(socket.connect(listener.local_addr()?), listener.accept());
    let mut endpoint = endpoint?;
    drop(server?);
    ensure!(endpoint.read(&mut [0]).await? == 0, "received bytes on a connection without any");
    let inserted = source.insert(&endpoint);
    // The slot must outlive its socket.
    drop(endpoint);
    ensure!(inserted.is_err(), "the kernel took the socket");
    Ok(())
}
