//! Tests of the number of connections to a replica, against servers that take few streams on each, and of how they are made.

use std::{net::SocketAddr, pin::pin};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::{TcpListener, UnixListener},
    time::timeout,
};

use super::*;
use crate::{
    config::{Epp, ServerTls},
    metrics::Metrics,
};

/// Fails if `what` takes longer than any correct run.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), what).await.expect("in time")
}

async fn until(what: impl Fn() -> bool) {
    soon(async {
        while !what() {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// A server that takes this many streams on each connection.
async fn server(streams: u32) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut http2 =
                    h2::server::Builder::new().max_concurrent_streams(streams).handshake::<_, Bytes>(tcp).await?;
                while http2.accept().await.is_some() {}
                Ok::<(), h2::Error>(())
            });
        }
    });
    address
}

/// Connections to this server, and the metrics that count them.
fn connections_to(server: &impl ToString, idle: Duration) -> (ReplicaConnections, Arc<Metrics>) {
    let metrics = Metrics::new(&["gpu".to_owned()]);
    let epp = Epp { tls: ServerTls::Off, ..Epp::new(server.to_string()) };
    let replicas = Arc::new(Replicas::new(&epp).unwrap().counted(metrics.pool(0).epp_connections()));
    let replica = Arc::clone(&replicas.snapshot().replicas[0]);
    let ReplicaConnections(inner) = ReplicaConnections::new(&replicas, &replica);
    let inner = Arc::into_inner(inner).unwrap();
    (ReplicaConnections(Arc::new(ConnectionsInner { idle, ..inner })), metrics)
}

/// Open now, and opened in all.
fn counted(metrics: &Metrics) -> [u64; 2] {
    let text = metrics.encode();
    ["penstock_epp_connections{", "penstock_epp_connections_opened_total{"].map(|name| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0, |value| value.parse().unwrap())
    })
}

impl ReplicaConnections {
    fn count(&self) -> usize {
        self.0.open.lock().connections.len()
    }
}

#[tokio::test]
async fn there_are_at_most_64_connections_and_further_streams_are_queued() {
    let (connection, metrics) = connections_to(&server(2).await, IDLE);
    let mut streams = Vec::new();
    for number in 0..2 * MAX_CONNECTIONS + 5 {
        let stream = soon(connection.stream()).await.unwrap();
        assert_eq!(stream.is_queued, number >= 2 * MAX_CONNECTIONS, "stream {number}");
        assert_eq!(connection.count(), (number / 2 + 1).min(MAX_CONNECTIONS), "stream {number}");
        streams.push(stream);
    }
    assert_eq!(counted(&metrics), [64, 64]);
    // A stream that has ended makes room.
    streams.remove(2 * MAX_CONNECTIONS - 1);
    assert!(!soon(connection.stream()).await.unwrap().is_queued);
    assert_eq!(counted(&metrics), [64, 64]);
}

#[tokio::test]
async fn idle_connections_are_closed_except_one() {
    let idle = Duration::from_millis(50);
    let (connection, metrics) = connections_to(&server(1).await, idle);
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(soon(connection.stream()).await.unwrap());
    }
    assert_eq!(counted(&metrics), [4, 4]);
    // The last one has a stream.
    let kept = streams.pop();
    streams.clear();
    let freed = Instant::now();
    until(|| connection.count() == 2).await;
    assert!(freed.elapsed() >= idle, "closed after {:?}", freed.elapsed());
    until(|| counted(&metrics) == [2, 4]).await;
    drop(kept);
    until(|| connection.count() == 1 && counted(&metrics) == [1, 4]).await;
    // The one that is left is used.
    assert!(!soon(connection.stream()).await.unwrap().is_queued);
    assert_eq!(counted(&metrics), [1, 4]);
}

#[tokio::test]
async fn connection_that_ends_is_not_counted_as_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (connection, metrics) = connections_to(&listener.local_addr().unwrap(), IDLE);
    let accepting = async { h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap() };
    let (server, stream) = soon(async { tokio::join!(accepting, connection.stream()) }).await;
    let server: h2::server::Connection<_, Bytes> = server;
    assert_eq!(counted(&metrics), [1, 1]);
    drop(server);
    until(|| counted(&metrics) == [0, 1]).await;
    drop(stream);
}

#[tokio::test]
async fn full_backlog_of_a_unix_socket_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("epp.sock");
    let address = SockAddr::unix(&path).unwrap();
    let socket = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let listener = socket();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let mut waiting = Vec::new();
    let full = loop {
        let client = socket();
        match client.connect(&address) {
            Ok(()) => waiting.push(client),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let (connections, metrics) = connections_to(&format!("unix:{}", path.display()), IDLE);
    let mut connecting = pin!(connections.get());
    let early = timeout(Duration::from_millis(200), &mut connecting).await;
    assert!(early.is_err(), "{:?}", early.map(Result::err));
    assert!(!connections.0.replica.is_unreachable());
    let listener = UnixListener::from_std(listener.into()).unwrap();
    let accepting = async {
        for _ in &waiting {
            listener.accept().await.unwrap();
        }
        h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap()
    };
    let (server, connected) = soon(async { tokio::join!(accepting, connecting) }).await;
    let _server: h2::server::Connection<_, Bytes> = server;
    connected.unwrap();
    assert!(!metrics.encode().contains("penstock_local_faults_total{"));
}
