//! An agent that joins one client with one endpoint, and streams whose every byte is known by its position.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use super::{
    super::{TcpConnection, Watched, Wire, WireError},
    net::{Family, Net, TO_CLIENT, TO_ENDPOINT},
};

/// For what needs milliseconds; the machine may be busy.
pub(super) const SOON: Duration = Duration::from_secs(30);
const REQUEST: &[u8] = b"go";
const PIECE: usize = 300;
const PACE: Duration = Duration::from_millis(5);

/// A position in the stream tells the byte.
pub(super) fn byte(position: usize) -> u8 {
    (position % 251) as u8
}

pub(super) struct Scene {
    pub(super) net: Net,
    pub(super) wire: Arc<Wire>,
    pub(super) family: Family,
}

/// Both ends of a joined flow, and the agent's part.
pub(super) struct Joined {
    pub(super) client: Reader,
    pub(super) endpoint: Sender,
    pub(super) agent: Agent,
}

/// What the agent holds of a flow that has begun.
pub(super) struct Agent {
    pub(super) watched: Watched,
    pub(super) client: TcpStream,
    pub(super) endpoint: TcpStream,
    pub(super) relayed: usize,
}

impl Agent {
    /// Closes the sockets, then leaves the flow to linger.
    pub(super) fn release(self) {
        self.watched.close(&self.client, &self.endpoint);
    }
}

impl Scene {
    pub(super) fn new(family: Family) -> Self {
        Self::attached(family, &[TO_CLIENT, TO_ENDPOINT])
    }

    /// An agent whose programs are attached to these interfaces.
    pub(super) fn attached(family: Family, interfaces: &[&str]) -> Self {
        Self::on(Net::new(), family, interfaces)
    }

    /// The same in these namespaces.
    pub(super) fn on(net: Net, family: Family, interfaces: &[&str]) -> Self {
        let wire = net.agent.run(|| {
            let mut wire = Wire::load(16).expect("load");
            interfaces.iter().for_each(|name| wire.attach(name).expect("attach"));
            wire
        });
        Self { net, wire: Arc::new(wire), family }
    }

    /// Connects a client through the agent to an endpoint that sends pieces until the flow has begun.
    pub(super) fn join(&self) -> Joined {
        self.join_from(None)
    }

    /// The same from this address of the client.
    pub(super) fn join_from(&self, from: Option<SocketAddr>) -> Joined {
        let (client, endpoint, agent) = self.connect(from);
        let (begun, has_begun) = mpsc::channel();
        let (agent, endpoint) = std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                let mut sender = Sender { stream: endpoint, position: 0 };
                while has_begun.recv_timeout(PACE).is_err() {
                    sender.send(PIECE);
                }
                sender
            });
            let agent = self.join_agent(agent);
            begun.send(()).expect("the sender waits");
            (agent, sender.join().expect("no panic"))
        });
        Joined { client: Reader { stream: client, position: 0 }, endpoint, agent }
    }

    /// The client's connection, the endpoint's, and the agent's two.
    pub(super) fn connect(&self, from: Option<SocketAddr>) -> (TcpStream, TcpStream, (TcpStream, TcpStream)) {
        let listen = |address: SocketAddr| move || TcpListener::bind(address).expect("bind");
        let front = self.net.agent.run(listen(self.family.agent(0)));
        let server = self.net.endpoint.run(listen(self.family.endpoint(0)));
        let (near, far) = (front.local_addr().expect("bound"), server.local_addr().expect("bound"));
        let client = self.net.client.run(|| connect(from, near));
        let (to_client, _) = front.accept().expect("accept");
        let to_endpoint = self.net.agent.run(|| TcpStream::connect(far).expect("connect"));
        let (endpoint, _) = server.accept().expect("accept");
        for stream in [&client, &to_client, &to_endpoint, &endpoint] {
            stream.set_nodelay(true).expect("a socket");
            stream.set_read_timeout(Some(SOON)).expect("a socket");
            stream.set_write_timeout(Some(SOON)).expect("a socket");
        }
        (&client).write_all(REQUEST).expect("write");
        (client, endpoint, (to_client, to_endpoint))
    }

    /// Relays until the flow has begun.
    fn join_agent(&self, (client, endpoint): (TcpStream, TcpStream)) -> Agent {
        let deadline = Instant::now() + SOON;
        let (_nothing, never) = mpsc::channel::<()>();
        // Records of flows that have ended become free after a time.
        let watched = loop {
            match self.watch(&client, &endpoint) {
                Err(WireError::Full) => assert!(never.recv_timeout(PACE).is_err() && Instant::now() < deadline),
                watched => break watched.expect("watch"),
            }
        };
        let relayed = relay(&watched, &client, &endpoint, Watched::has_begun);
        Agent { watched, client, endpoint, relayed }
    }

    pub(super) fn watch(&self, client: &TcpStream, endpoint: &TcpStream) -> Result<Watched, WireError> {
        let connection = |stream: &TcpStream| TcpConnection::of(stream).expect("connected");
        self.wire.watch(connection(client), connection(endpoint))
    }

    /// Waits until a flow has ended.
    pub(super) fn await_end(&self, agent: &Agent) {
        let ended = agent.watched.changed(Watched::has_ended);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let in_time = runtime.block_on(async { tokio::time::timeout(SOON, ended).await });
        assert!(in_time.is_ok(), "the flow did not end: {:?}", agent.watched.seen());
    }
}

fn connect(from: Option<SocketAddr>, to: SocketAddr) -> TcpStream {
    let Some(from) = from else { return TcpStream::connect(to).expect("connect") };
    let domain = socket2::Domain::for_address(to);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("a socket");
    socket.bind(&from.into()).expect("bind");
    socket.connect_timeout(&to.into(), SOON).expect("connect");
    socket.into()
}

/// Forwards the request, then everything that comes back, until `is_over`. Arms the flow whenever nothing is left to forward.
pub(super) fn relay(
    watched: &Watched,
    client: &TcpStream,
    endpoint: &TcpStream,
    is_over: impl Fn(&Watched) -> bool,
) -> usize {
    let (mut client, mut endpoint) = (client, endpoint);
    let mut request = [0; REQUEST.len()];
    client.read_exact(&mut request).expect("the request");
    endpoint.write_all(&request).expect("write");
    endpoint.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket");
    let (deadline, mut relayed, mut buffer) = (Instant::now() + SOON, 0, vec![0; 1 << 16]);
    loop {
        watched.arm(client, endpoint).expect("arm");
        if is_over(watched) {
            return relayed;
        }
        assert!(Instant::now() < deadline, "still relaying: {:?}", watched.seen());
        match endpoint.read(&mut buffer) {
            Ok(0) => panic!("the endpoint closed"),
            Ok(n) => {
                client.write_all(&buffer[..n]).expect("write");
                relayed += n;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// The endpoint: sends bytes by position.
pub(super) struct Sender {
    pub(super) stream: TcpStream,
    pub(super) position: usize,
}

impl Sender {
    pub(super) fn send(&mut self, len: usize) {
        let bytes: Vec<u8> = (self.position..self.position + len).map(byte).collect();
        self.stream.write_all(&bytes).expect("write");
        self.position += len;
    }

    /// Reads what the client sent, up to its FIN.
    pub(super) fn read_to_end(&mut self) -> Vec<u8> {
        let mut got = Vec::new();
        self.stream.read_to_end(&mut got).expect("the client's FIN");
        got
    }

    /// Takes the request, which is the first that arrives.
    pub(super) fn take_request(&mut self) {
        let mut request = [0; REQUEST.len()];
        self.stream.read_exact(&mut request).expect("the request");
        assert_eq!(request, REQUEST);
    }
}

/// A read that signals of other tests in this process do not interrupt.
pub(super) fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// The client: compares bytes by position.
pub(super) struct Reader {
    pub(super) stream: TcpStream,
    pub(super) position: usize,
}

impl Reader {
    /// Reads up to this position.
    pub(super) fn read_up_to(&mut self, position: usize) {
        let mut buffer = vec![0; 1 << 16];
        while self.position < position {
            let most = buffer.len().min(position - self.position);
            let n = read(&mut self.stream, &mut buffer[..most]).expect("more of the stream");
            assert!(n > 0, "the stream ended at {} of {position}", self.position);
            self.compare(&buffer[..n]);
        }
    }

    /// Reads up to the end of the stream, which must be at this position.
    pub(super) fn read_to_end_at(&mut self, position: usize) {
        self.read_up_to(position);
        assert_eq!(
            read(&mut self.stream, &mut [0]).expect("the end of the stream"),
            0,
            "the stream did not end at {position}"
        );
    }

    fn compare(&mut self, bytes: &[u8]) {
        for &got in bytes {
            assert_eq!(got, byte(self.position), "wrong byte at {}", self.position);
            self.position += 1;
        }
    }
}
