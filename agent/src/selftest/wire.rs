//! The self-test of path `wire`: proves that this kernel rewrites packets between two peers without losing a byte, in network
//! namespaces of its own.
//!
//! Each case joins a client with an endpoint, as an agent does, and then only looks at what the two peers see.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::Check;
use crate::kernel::{
    socket,
    wire::{Seen, TcpConnection, TrialNet, Watched, Wire},
};

/// How long one call on a socket may take, and the wait for a flow to begin or to end. A delayed acknowledgement takes 40 ms.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the agent waits for the next piece before it looks whether the flow has begun.
const LOOK: Duration = Duration::from_millis(5);
const PIECE: usize = 300;
const BODY: usize = 256 << 10;
const REQUEST: &[u8] = b"request";

/// One requirement.
#[derive(Clone, Copy)]
pub struct WireCase {
    /// Its name in reports.
    pub name: &'static str,
    ipv6: bool,
    run: fn(&WireTrial, Joined) -> Result<()>,
}

/// The cases that path `wire` must pass.
pub const WIRE_CASES: &[WireCase] = &[
    WireCase { name: "content and end", ipv6: false, run: content },
    WireCase { name: "content and end over IPv6", ipv6: true, run: content },
    WireCase { name: "reset by the endpoint", ipv6: false, run: |trial, joined| reset(trial, joined, false) },
    WireCase { name: "reset by the client", ipv6: false, run: |trial, joined| reset(trial, joined, true) },
    WireCase { name: "client that sends", ipv6: false, run: sends },
];

#[cfg(test)]
pub(crate) const WIRE_FAILING: &[WireCase] =
    &[WireCase { name: "bad", ipv6: false, run: |_, _| bail!("a hole at {}", 7) }];

/// The programs in namespaces of their own.
pub struct WireTrial {
    net: TrialNet,
    wire: Arc<Wire>,
}

/// Both peers of a flow that has begun, and what the agent holds of it.
struct Joined {
    client: TcpStream,
    endpoint: TcpStream,
    watched: Watched,
    agent: [TcpStream; 2],
    /// Bytes of the stream that the endpoint has sent, and that the client has compared.
    sent: usize,
    got: usize,
}

/// Runs the cases. Fails if their network namespaces cannot be made.
pub fn prove_wire(cases: &[WireCase]) -> Result<Vec<Check>> {
    let trial = WireTrial::new()?;
    let has_ipv6 = trial.net.has_ipv6;
    let checks = cases.iter().filter(|case| has_ipv6 || !case.ipv6).map(|case| {
        let begin = Instant::now();
        let outcome = trial.join(case.ipv6).context("no flow began").and_then(|joined| (case.run)(&trial, joined));
        Check { case: case.name, took: begin.elapsed(), failure: outcome.err().map(|error| format!("{error:#}")) }
    });
    let checks = checks.collect();
    // The programs are attached in that namespace.
    let WireTrial { net, wire } = trial;
    net.agent.run(move || drop(wire))?;
    Ok(checks)
}

impl WireTrial {
    fn new() -> Result<Self> {
        let net = TrialNet::new().context("cannot make network namespaces (needs CAP_SYS_ADMIN)")?;
        let wire = net.agent.run(|| -> Result<Wire> {
            let mut wire = Wire::load(4 * WIRE_CASES.len() as u32)?;
            TrialNet::INTERFACES.iter().try_for_each(|name| wire.attach(name))?;
            Ok(wire)
        })??;
        Ok(Self { net, wire: Arc::new(wire) })
    }

    /// Relays a stream until the kernel carries it.
    fn join(&self, ipv6: bool) -> Result<Joined> {
        let (front, back) = (TrialNet::agent_address(ipv6), TrialNet::endpoint_address(ipv6));
        let front = self.net.agent.run(|| TcpListener::bind(front))??;
        let back = self.net.endpoint.run(|| TcpListener::bind(back))??;
        let (near, far) = (front.local_addr()?, back.local_addr()?);
        let client = self.net.client.run(|| TcpStream::connect_timeout(&near, PATIENCE))??;
        let to_endpoint = self.net.agent.run(|| TcpStream::connect_timeout(&far, PATIENCE))??;
        // Both handshakes are complete.
        let ((to_client, _), (endpoint, _)) = (front.accept()?, back.accept()?);
        for stream in [&client, &to_client, &to_endpoint, &endpoint] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
        }
        (&client).write_all(REQUEST)?;
        let mut request = [0; REQUEST.len()];
        (&to_client).read_exact(&mut request)?;
        let watched = self.wire.watch(TcpConnection::of(&to_client)?, TcpConnection::of(&to_endpoint)?)?;
        (&to_endpoint).write_all(&request)?;
        (&endpoint).read_exact(&mut request)?;
        to_endpoint.set_read_timeout(Some(LOOK))?;
        let mut joined = Joined { client, endpoint, watched, agent: [to_client, to_endpoint], sent: 0, got: 0 };
        joined.relay()?;
        Ok(joined)
    }
}

impl Joined {
    fn relay(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; PIECE];
        while !self.watched.has_begun() {
            ensure!(Instant::now() < deadline, "still relaying: {:?}", self.watched.seen());
            self.watched.arm(&self.agent[0], &self.agent[1])?;
            self.send(PIECE)?;
            match self.agent[1].read(&mut buffer) {
                Ok(0) => bail!("the endpoint's connection ended"),
                Ok(n) => {
                    self.agent[0].write_all(&buffer[..n])?;
                    self.get(self.got + n)?;
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.get(self.sent)
    }

    fn send(&mut self, len: usize) -> Result<()> {
        let bytes: Vec<u8> = (self.sent..self.sent + len).map(byte).collect();
        self.endpoint.write_all(&bytes).context("the endpoint cannot send")?;
        self.sent += len;
        Ok(())
    }

    /// Lets the client read up to this position.
    fn get(&mut self, position: usize) -> Result<()> {
        let mut bytes = vec![0; position - self.got];
        self.client.read_exact(&mut bytes).with_context(|| format!("the client has {} bytes", self.got))?;
        let wrong = bytes.iter().zip(self.got..).find(|(got, at)| **got != byte(*at));
        ensure!(wrong.is_none(), "wrong byte at {}", wrong.map_or(0, |(_, at)| at));
        self.got = position;
        Ok(())
    }

    /// Sends a body while the client reads it.
    fn transfer(&mut self) -> Result<()> {
        let end = self.sent + BODY;
        let bytes: Vec<u8> = (self.sent..end).map(byte).collect();
        let endpoint = self.endpoint.try_clone()?;
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| (&endpoint).write_all(&bytes));
            let got = self.get(end);
            sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            got
        })?;
        self.sent = end;
        Ok(())
    }

    /// Waits for the flow's end.
    fn ended(&self) -> Result<Seen> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let ended = self.watched.changed(Watched::has_ended);
        let in_time = runtime.block_on(async { tokio::time::timeout(PATIENCE, ended).await });
        ensure!(in_time.is_ok(), "the flow did not end: {:?}", self.watched.seen());
        Ok(self.watched.seen())
    }
}

/// A position in the stream tells the byte.
fn byte(position: usize) -> u8 {
    (position % 251) as u8
}

fn content(_: &WireTrial, mut joined: Joined) -> Result<()> {
    joined.transfer()?;
    joined.endpoint.shutdown(Shutdown::Write)?;
    ensure!(read(&mut joined.client)? == 0, "the client got bytes beyond the end");
    joined.client.shutdown(Shutdown::Write)?;
    ensure!(read(&mut joined.endpoint)? == 0, "the endpoint got bytes that the client had not sent");
    let seen = joined.ended()?;
    ensure!(seen.bytes as usize > BODY && seen.marks == 0, "counted: {seen:?}");
    let last = joined.watched.last_bytes().bytes;
    let expected = (joined.sent - last.len()..joined.sent).map(byte);
    ensure!(!last.is_empty() && expected.eq(last), "the kept end of the stream differs");
    Ok(())
}

fn reset(_: &WireTrial, joined: Joined, by_client: bool) -> Result<()> {
    let Joined { client, endpoint, watched, agent, .. } = joined;
    let (from, mut to) = if by_client { (client, endpoint) } else { (endpoint, client) };
    socket::set_reset_on_close(&from, true);
    drop(from);
    expect_reset(&mut to)?;
    drop((watched, agent));
    Ok(())
}

fn sends(_: &WireTrial, mut joined: Joined) -> Result<()> {
    joined.client.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    joined.transfer()?;
    ensure!(!socket::has_more(&joined.endpoint)?, "the endpoint got what the client sent");
    let Joined { client, mut endpoint, watched, agent, .. } = joined;
    ensure!(watched.seen().refused > 0, "nothing was refused: {:?}", watched.seen());
    drop(client);
    expect_reset(&mut endpoint)?;
    drop((watched, agent));
    Ok(())
}

fn read(stream: &mut TcpStream) -> std::io::Result<usize> {
    loop {
        match stream.read(&mut [0]) {
            // By a signal.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn expect_reset(stream: &mut TcpStream) -> Result<()> {
    match read(stream) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error).context("instead of a reset"),
        Ok(n) => bail!("{n} bytes instead of a reset"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability;

    #[test]
    fn running_kernel_passes_every_case_and_keeps_nothing() {
        let checks = prove_wire(WIRE_CASES).expect("the cases run");
        assert_eq!(checks.len(), WIRE_CASES.len());
        assert!(checks.iter().all(|check| check.failure.is_none()), "{checks:#?}");
        let interfaces = nix::net::if_::if_nameindex().expect("interfaces");
        let is_ours = |name: &std::ffi::CStr| TrialNet::INTERFACES.iter().any(|own| own.as_bytes() == name.to_bytes());
        assert!(!interfaces.iter().any(|interface| is_ours(interface.name())));
    }

    #[test]
    fn without_a_namespace_the_cases_cannot_run() {
        let kept = capability::LOADING;
        let error = capability::with(&kept, || prove_wire(WIRE_CASES)).expect_err("no CAP_SYS_ADMIN");
        assert_eq!(
            format!("{error:#}"),
            "cannot make network namespaces (needs CAP_SYS_ADMIN): Operation not permitted (os error 1)"
        );
    }

    #[test]
    fn case_whose_peers_see_something_else_fails() {
        let wrong: [WireCase; 3] = [
            WireCase {
                name: "wrong byte",
                ipv6: false,
                run: |_, mut joined| {
                    joined.got += 1;
                    joined.transfer()
                },
            },
            WireCase {
                name: "no reset",
                ipv6: false,
                run: |_, joined| {
                    joined.endpoint.shutdown(Shutdown::Write)?;
                    expect_reset(&mut joined.client.try_clone()?)
                },
            },
            WireCase {
                name: "no flow any more",
                ipv6: false,
                run: |trial, joined| {
                    joined.watched.close(&joined.agent[0], &joined.agent[1]);
                    joined.endpoint.shutdown(Shutdown::Both)?;
                    content(trial, joined)
                },
            },
        ];
        let checks = prove_wire(&wrong).expect("the cases run");
        assert!(checks.iter().all(|check| check.failure.is_some()), "{checks:#?}");
    }
}
