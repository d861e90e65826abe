//! Retransmissions that overlap received bytes, which loopback never produces. The peer writes single TCP segments, so that the
//! test chooses each byte range.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use penstock_common::{framing::Framing, path::Path};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
};

use super::{ConnectionTimeouts, EndpointConnection};
use crate::{
    client::ClientSocket,
    deliver::{Delivery, End},
    kernel::{Kernel, tun},
    steer::{
        WorkerSteering,
        session::{Session, Target},
    },
};

const PEER: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 2);
const US: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 1);
const PORT: u16 = 8000;
const PATIENCE: Duration = Duration::from_secs(10);
/// The peer's first sequence number, which wraps after a few bytes.
const FIRST: u32 = 0xffff_fff0;

const SYN_ACK: u8 = 0x12;
const PSH_ACK: u8 = 0x18;

/// The peer of one connection, which sends single segments.
struct Peer {
    tun: File,
    port: u16,
    acknowledge: u32,
}

impl Peer {
    /// Accepts the first SYN.
    fn accept(mut tun: File) -> Self {
        let mut packet = [0; 2048];
        loop {
            let n = tun.read(&mut packet).expect("a packet");
            let tcp = &packet[20..n];
            // IPv4, TCP, only SYN set. The interface also sends IPv6 router solicitations.
            if packet[0] == 0x45 && packet[9] == 6 && tcp[13] == 2 {
                let port = u16::from_be_bytes([tcp[0], tcp[1]]);
                let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                let mut peer = Self { tun, port, acknowledge: sequence.wrapping_add(1) };
                peer.segment(FIRST.wrapping_sub(1), SYN_ACK, &[]);
                return peer;
            }
        }
    }

    /// Sends the bytes of the stream from `at` on.
    fn send(&mut self, at: u32, bytes: &[u8]) {
        self.segment(FIRST.wrapping_add(at), PSH_ACK, bytes);
    }

    fn segment(&mut self, sequence: u32, flags: u8, payload: &[u8]) {
        let mut tcp = Vec::new();
        tcp.extend(PORT.to_be_bytes());
        tcp.extend(self.port.to_be_bytes());
        tcp.extend(sequence.to_be_bytes());
        tcp.extend(self.acknowledge.to_be_bytes());
        tcp.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(payload);
        let mut pseudo = [PEER.octets(), US.octets()].concat();
        pseudo.extend([0, 6]);
        pseudo.extend((tcp.len() as u16).to_be_bytes());
        pseudo.extend(&tcp);
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());

        let mut ip = vec![0x45, 0];
        ip.extend((20 + tcp.len() as u16).to_be_bytes());
        ip.extend([0, 1, 0, 0, 64, 6, 0, 0]);
        ip.extend(PEER.octets());
        ip.extend(US.octets());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip.extend(tcp);
        assert_eq!(self.tun.write(&ip).expect("a write to the interface"), ip.len());
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The bytes of the test stream.
fn stream(len: u32) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

/// Runs `test` in its own network namespace, with a connection to the peer that is registered with the kernel program.
fn with_peer(test: impl AsyncFnOnce(Peer, EndpointConnection, Rc<WorkerSteering>) + Send + 'static) {
    let run = move || {
        let kernel = Arc::new(Kernel::load(16).expect("load"));
        let tun = tun::isolated().expect("a network namespace with an interface");
        let peer = std::thread::spawn(move || Peer::accept(tun));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let steering = WorkerSteering::new(&kernel).expect("maps");
            let address = SocketAddr::from((PEER, PORT));
            let times = ConnectionTimeouts { keep_alive: PATIENCE, connect: Some(PATIENCE), unreachable: None };
            let endpoint =
                EndpointConnection::connect(address, times, Some(&steering), 1 << 19).await.expect("connect");
            assert!(endpoint.source().is_some());
            let test = test(peer.join().expect("peer"), endpoint, steering);
            tokio::time::timeout(PATIENCE, test).await.expect("in time");
        });
    };
    // The namespace belongs to the thread and ends with it.
    std::thread::spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn overlapping_retransmission_is_read_once() {
    with_peer(async |mut peer, mut endpoint, _| {
        let bytes = stream(20_000);
        let mut got = BytesMut::with_capacity(1 << 16);
        // Start and end of each segment: overlaps of 10 bytes, of nearly everything, across several pages, and none.
        for (from, to) in [(0, 10), (0, 20), (15, 21), (1, 9000), (9000, 9001), (4, 20_000)] {
            peer.send(from, &bytes[from as usize..to as usize]);
            while got.len() < to as usize {
                endpoint.read(&mut got).await.expect("read");
            }
            assert_eq!(got.len(), to as usize, "after {from}..{to}");
            assert!(got[..] == bytes[..to as usize], "after {from}..{to}");
        }
    });
}

#[test]
fn overlapping_retransmission_is_redirected_once() {
    with_peer(async |mut peer, mut endpoint, steering| {
        let bytes = stream(6000);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (reader, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut reader, mut client) =
            (reader.expect("connect"), ClientSocket::new(accepted.expect("accept").0).expect("client"));
        let key = client.make_target(&steering, 1 << 20).expect("target");
        let target = Target { key, send_buffer: 1 << 20 };
        let mut session = Session::new(Path::Ingress, target, Framing::length(6000), endpoint.source());
        session.idle = Some(PATIENCE);
        let mut delivery = Delivery::new(&mut client, &mut endpoint, session, BytesMut::new());
        let read = async {
            let mut got = vec![0; 6000];
            let mut at = 0;
            for (from, to) in [(0, 10), (0, 20), (15, 2000), (2000, 2001), (4, 6000)] {
                peer.send(from, &bytes[from as usize..to as usize]);
                reader.read_exact(&mut got[at..to as usize]).await.expect("read");
                at = to as usize;
                assert!(got[..at] == bytes[..at], "after {from}..{to}");
            }
        };
        let (end, ()) = tokio::join!(delivery.run(), read);
        assert_eq!(end, End::Complete { reusable: true });
        let account = &delivery.session.account;
        assert_eq!((account.steered, account.relayed), (6000, 0));
    });
}

/// Whether a request may have been executed depends on this: a reset does not acknowledge the bytes that it responds to.
#[test]
fn reset_acknowledges_nothing_but_an_earlier_ack_counts() {
    const ACK: u8 = 0x10;
    const RST: u8 = 0x04;
    for acknowledges in [0, 7] {
        with_peer(async move |mut peer, mut endpoint, _steering| {
            let before = endpoint.acknowledged().expect("a count");
            crate::kernel::socket::write_all(&endpoint.stream().expect("a stream"), b"request").await.expect("written");
            peer.acknowledge += acknowledges;
            if acknowledges > 0 {
                peer.segment(FIRST, ACK, &[]);
            }
            peer.segment(FIRST, RST, &[]);
            assert!(endpoint.read(&mut BytesMut::with_capacity(1)).await.is_err());
            assert_eq!(endpoint.acknowledged(), Some(before + u64::from(acknowledges)));
        });
    }
}
