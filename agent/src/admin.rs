//! The admin server: `/livez`, `/readyz`, `/metrics`; over loopback alone `/config`, `/drain`, `/flows`, `/log`, `/pools`.
//!
//! Runs on its own thread and runtime and holds data-plane locks only while copying, so it answers even if the data
//! plane is stuck. Each connection carries one request and has a time limit. Probes are answered under overload: a new
//! connection replaces the oldest one, and file descriptors are reserved for it.

mod answer;
mod flows;
mod places;
mod pools;

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    rc::Rc,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use futures_util::FutureExt as _;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::{net::TcpStream, sync::oneshot, task::LocalSet};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    panics::PanicWatch,
    readiness::Readiness,
    reserve::{Reserve, is_exhausted},
};
use answer::Answers;

pub use answer::Inside;
use places::{AdminPlace, Places};

/// A running admin server. Dropping it stops the server and closes its connections; the address is free afterwards.
#[derive(Debug)]
pub struct AdminHandle {
    local_addr: SocketAddr,
    /// A duplicate for another process.
    listener: Mutex<Option<TcpListener>>,
    gates: AdminGates,
    /// The server stops when this sender is dropped.
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminHandle {
    /// The bound address; if port 0 was configured, with the port that the kernel chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Begins to accept.
    pub fn accept(&self) {
        self.gates.begin.cancel();
    }

    /// A duplicate of the listening socket; `None` after [`release`](Self::release).
    pub fn socket(&self) -> io::Result<Option<TcpListener>> {
        self.listener.lock().as_ref().map(TcpListener::try_clone).transpose()
    }

    /// Leaves the socket to another process: accepts no more connections, and answers those that it has.
    pub fn release(&self) {
        *self.listener.lock() = None;
        self.gates.release.cancel();
    }
}

/// When the server accepts.
#[derive(Debug, Clone, Default)]
struct AdminGates {
    begin: CancellationToken,
    release: CancellationToken,
}

impl Drop for AdminHandle {
    fn drop(&mut self) {
        self.stop = None;
        *self.listener.lock() = None;
        if let Some(thread) = self.thread.take() {
            // Its panic has been counted.
            let _ = thread.join();
        }
    }
}

/// Serves requests on `listener`, which accepts after [`AdminHandle::accept`]. `verbose` returns the lines that
/// `/readyz?verbose` adds; it runs on the admin thread and must not block.
pub fn start(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    verbose: impl Fn() -> Vec<String> + Send + Sync + 'static,
    inside: Inside,
    watch: &PanicWatch,
) -> io::Result<AdminHandle> {
    let answers = Answers::new(metrics, readiness, Box::new(verbose), inside);
    let bounds = Bounds { connections: 128, head: Duration::from_secs(5), whole: Duration::from_secs(30) };
    serve(listener, answers, bounds, watch)
}

#[derive(Clone, Copy)]
struct Bounds {
    /// Maximum number of connections whose request is incomplete, and also of those whose answer is being written.
    connections: usize,
    /// Time limit from accept to the end of the request head.
    head: Duration,
    /// Time limit from accept to the end of the connection.
    whole: Duration,
}

const THREAD: &str = "admin";
/// File descriptors reserved for the admin server.
const RESERVE: usize = 4;
/// Pause after an `accept` that failed.
const PAUSE: Duration = Duration::from_millis(10);

fn serve(listener: TcpListener, answers: Answers, bounds: Bounds, watch: &PanicWatch) -> io::Result<AdminHandle> {
    listener.set_nonblocking(true)?;
    let local_addr = listener.local_addr()?;
    let duplicate = Mutex::new(Some(listener.try_clone()?));
    let gates = AdminGates::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    let (stop, stopped) = oneshot::channel::<Infallible>();
    let (watch, opened) = (watch.clone(), gates.clone());
    let work = move || {
        LocalSet::new().block_on(&runtime, async {
            let accepting = async {
                opened.begin.cancelled().await;
                tokio::select! {
                    () = accept(listener, Rc::new(answers), bounds) => {}
                    () = opened.release.cancelled() => {}
                }
                // Connections are answered until the stop.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = accepting => {}
                _ = stopped => {}
            }
        });
    };
    let thread = thread::Builder::new().name(THREAD.to_owned()).spawn(move || watch.run(THREAD, work))?;
    Ok(AdminHandle { local_addr, listener: duplicate, gates, stop: Some(stop), thread: Some(thread) })
}

/// Accepts every connection; one beyond the bounds replaces an older one.
async fn accept(listener: tokio::net::TcpListener, answers: Rc<Answers>, bounds: Bounds) {
    let places = Rc::new(Places::new(bounds.connections));
    let reserve = Rc::new(Reserve::new(RESERVE));
    let take = |(stream, peer): (TcpStream, SocketAddr)| {
        let place = Places::enter(&places, peer.ip());
        tokio::task::spawn_local(connection(stream, place, Rc::clone(&answers), Rc::clone(&reserve), bounds));
    };
    loop {
        match listener.accept().await {
            Ok(accepted) => take(accepted),
            // The kernel allocates the descriptor before it checks for a connection, so the retry can find no
            // connection waiting.
            Err(error) if is_exhausted(&error) && reserve.release() => match listener.accept().now_or_never() {
                Some(Ok(accepted)) => {
                    answers.metrics.accept_failed("admin");
                    take(accepted);
                }
                _ => reserve.refill(),
            },
            Err(error) if is_exhausted(&error) => {
                places.shed();
                tokio::time::sleep(PAUSE).await;
                reserve.refill();
            }
            // The client closed before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "admin: accept failed");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(
    mut stream: TcpStream,
    place: AdminPlace,
    answers: Rc<Answers>,
    reserve: Rc<Reserve>,
    bounds: Bounds,
) {
    let is_local = stream.peer_addr().is_ok_and(|peer| peer.ip().to_canonical().is_loopback());
    let service = service_fn(|request| {
        place.answering();
        let answer = answers.answer(&request, is_local);
        async { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.head)
        .keep_alive(false)
        // Answers a client that has half-closed.
        .half_close(true)
        .serve_connection(TokioIo::new(&mut stream), service);
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::debug!(%error, "admin: connection failed");
        },
        () = place.shed() => tracing::debug!("admin: connection shed"),
        () = tokio::time::sleep(bounds.whole) => tracing::debug!("admin: connection timed out"),
    }
    reserve.reclaim(stream);
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, Shutdown, TcpStream},
        time::Instant,
    };

    use serde_json::json;

    use super::*;
    use crate::probe::Probe;

    const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    struct Server {
        metrics: Arc<Metrics>,
        readiness: Readiness,
        handle: AdminHandle,
    }

    fn server(bounds: Bounds) -> Server {
        let metrics = Metrics::new(&["a".to_owned()]);
        let readiness = Readiness::new();
        let verbose = || vec!["steering: active (ingress)".to_owned(), "pools: 1".to_owned()];
        let answers = Answers::new(Arc::clone(&metrics), readiness.clone(), Box::new(verbose), inside());
        let listener = TcpListener::bind(ANY_PORT).unwrap();
        let watch = PanicWatch::new(&readiness, Probe::default());
        let handle = serve(listener, answers, bounds, &watch).unwrap();
        handle.accept();
        Server { metrics, readiness, handle }
    }

    fn inside() -> Inside {
        let (pools, config) = (|| json!([{ "name": "a" }]), || json!({ "listen": {} }));
        Inside { flows: None, pools: Box::new(pools), config: Box::new(config), stop: CancellationToken::new() }
    }

    fn patient() -> Bounds {
        Bounds { connections: 64, head: Duration::from_secs(60), whole: Duration::from_secs(60) }
    }

    fn connect(server: &Server) -> TcpStream {
        let stream = TcpStream::connect(server.handle.local_addr()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn rest(mut stream: TcpStream) -> String {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Status, head and body.
    fn ask(server: &Server, request: &str) -> (u16, String, String) {
        let mut stream = connect(server);
        write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let answer = rest(stream);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
    }

    #[test]
    fn livez_answers_ok() {
        let server = server(patient());
        let (status, _, body) = ask(&server, "GET /livez");
        assert_eq!((status, body.as_str()), (200, "ok\n"));
    }

    #[test]
    fn readyz_is_ok_from_open_gates_until_the_drain() {
        let server = server(patient());
        let gates = [server.readiness.gate("listeners"), server.readiness.gate("picker: a")];
        let (status, _, body) = ask(&server, "GET /readyz");
        assert_eq!((status, body.as_str()), (503, "listeners\npicker: a\n"));
        let (status, _, body) = ask(&server, "GET /readyz?verbose");
        assert_eq!((status, body.as_str()), (503, "listeners\npicker: a\nsteering: active (ingress)\npools: 1\n"));
        gates.into_iter().for_each(crate::readiness::Gate::open);
        let (status, _, body) = ask(&server, "GET /readyz");
        assert_eq!((status, body.as_str()), (200, "ok\n"));
        let (status, _, body) = ask(&server, "GET /readyz?x=1&verbose=1");
        assert_eq!((status, body.as_str()), (200, "ok\nsteering: active (ingress)\npools: 1\n"));
        server.readiness.draining();
        let (status, _, body) = ask(&server, "GET /readyz");
        assert_eq!((status, body.as_str()), (503, "draining\n"));
    }

    #[test]
    fn metrics_are_served_as_open_metrics() {
        let server = server(patient());
        server.metrics.client_aborted();
        let (status, head, body) = ask(&server, "GET /metrics");
        assert_eq!(status, 200);
        assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
        assert_eq!(body, server.metrics.encode());
        assert!(body.contains("penstock_client_aborts_total 1\n"));
    }

    #[test]
    fn pools_are_described_as_json() {
        let (status, head, body) = ask(&server(patient()), "GET /pools");
        assert_eq!((status, body.as_str()), (200, "[{\"name\":\"a\"}]\n"));
        assert!(head.contains("content-type: application/json"), "{head}");
    }

    #[test]
    fn web_pages_get_nothing_from_inside() {
        let server = server(patient());
        let ask = |head: &str| {
            let mut stream = connect(&server);
            write!(stream, "{head}\r\n\r\n").unwrap();
            rest(stream)[9..12].parse::<u16>().unwrap()
        };
        for request in ["GET /config HTTP/1.1", "GET /pools HTTP/1.1", "POST /drain HTTP/1.1"] {
            for headers in ["Host: page.example", "Host: localhost\r\nOrigin: http://page.example", "Host: a b"] {
                assert_eq!(ask(&format!("{request}\r\n{headers}")), 403, "{request} {headers}");
            }
        }
        for headers in ["Host: localhost:9901", "Host: [::1]:9901", "Host: 127.0.0.1", "X: no host"] {
            assert_eq!(ask(&format!("GET /config HTTP/1.0\r\n{headers}")), 200, "{headers}");
        }
        assert_eq!(ask("GET /livez HTTP/1.1\r\nHost: page.example"), 200);
    }

    #[test]
    fn other_paths_and_methods_are_refused() {
        let server = server(patient());
        for (request, status) in [
            ("GET /", 404),
            ("GET /metrics/", 404),
            ("POST /nowhere", 404),
            ("POST /metrics", 405),
            ("DELETE /livez", 405),
            ("POST /flows", 405),
            ("GET /flows/10.0.0.1:1", 405),
            ("DELETE /flows/10.0.0.1", 400),
            ("DELETE /flows/10.0.0.1:1", 404),
            ("DELETE /flowsandmore", 404),
            ("DELETE /flows", 200),
            ("PUT /pools", 405),
            ("GET /pools/a", 404),
            ("PUT /config", 405),
            ("GET /drain", 405),
            ("POST /drain/now", 404),
            ("POST /log", 405),
            // The tests have no log.
            ("GET /log", 404),
            ("PUT /log?filter=debug", 404),
            ("PUT /log", 400),
            ("PUT /log?filter=penstock%3Dloud", 400),
            ("OPTIONS /readyz", 405),
            ("HEAD /readyz", 200),
        ] {
            let (found, head, _) = ask(&server, request);
            assert_eq!(found, status, "{request}");
            assert_eq!(head.contains("\r\nallow: "), status == 405, "{head}");
        }
    }

    #[test]
    fn silent_client_is_closed() {
        let short = Duration::from_millis(30);
        for bounds in [Bounds { head: short, ..patient() }, Bounds { whole: short, ..patient() }] {
            let server = server(bounds);
            let mut silent = connect(&server);
            silent.write_all(b"GET /livez HTTP/1.1\r\n").unwrap();
            // The connection ends, with or without a 408, well before the read deadline.
            let _ = rest(silent);
        }
    }

    /// Opens 300 of each kind of client that holds a connection open, and probes after each kind.
    #[test]
    fn probe_is_answered_with_hundreds_of_held_connections() {
        let server = server(patient());
        let mut held = Vec::new();
        for sent in ["", "\r\n", "GET /livez HTTP/1.1\r\nHost: a\r\n", "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"] {
            for _ in 0..300 {
                let mut stream = connect(&server);
                stream.write_all(sent.as_bytes()).unwrap();
                held.push(stream);
            }
            for path in ["/livez", "/readyz", "/metrics"] {
                assert_eq!(ask(&server, &format!("GET {path}")).0, 200, "while clients hold {sent:?}");
            }
        }
    }

    #[test]
    fn connection_beyond_the_bound_sheds_the_oldest() {
        let server = server(Bounds { connections: 2, ..patient() });
        let held: Vec<_> = (0..2).map(|_| connect(&server)).collect();
        assert_eq!(ask(&server, "GET /livez").0, 200);
        let _ = (&held[0]).read(&mut [0; 1]);
        // The younger connection keeps its place.
        (&held[1]).write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        held[1].shutdown(Shutdown::Write).unwrap();
        assert!(rest(held[1].try_clone().unwrap()).ends_with("ok\n"));
    }

    #[test]
    fn connections_opened_and_closed_immediately_do_not_delay_probes() {
        let server = server(patient());
        let addr = server.handle.local_addr();
        for _ in 0..20 {
            for _ in 0..100 {
                drop(TcpStream::connect(addr).unwrap());
            }
            assert_eq!(ask(&server, "GET /livez").0, 200);
        }
    }

    #[test]
    fn stop_frees_the_address_and_ends_open_connections() {
        let server = server(patient());
        let addr = server.handle.local_addr();
        let open = connect(&server);
        drop(server.handle);
        assert!(TcpStream::connect(addr).is_err());
        // RST or FIN, depending on whether the connection had been accepted.
        let _ = (&open).read(&mut [0; 1]);
    }

    /// As when another process takes over: connections wait for the one that accepts, and those accepted are answered.
    #[test]
    fn released_server_answers_its_connections_and_accepts_no_more() {
        let server = server(patient());
        let other = server.handle.socket().unwrap().unwrap();
        let mut open = connect(&server);
        open.write_all(b"GET /livez HTTP/1.1\r\n").unwrap();
        assert_eq!(ask(&server, "GET /livez").0, 200);
        server.handle.release();
        assert!(server.handle.socket().unwrap().is_none());
        // It may accept for a moment.
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut clients = Vec::new();
        let accepted = loop {
            clients.push(connect(&server));
            if let Ok((_, peer)) = other.accept() {
                break peer;
            }
            assert!(Instant::now() < deadline, "still accepting");
        };
        assert!(clients.iter().any(|client| client.local_addr().unwrap() == accepted));
        open.write_all(b"Host: a\r\n\r\n").unwrap();
        assert!(rest(open).ends_with("ok\n"));
    }

    #[test]
    fn drop_stops_the_server() {
        let server = server(patient());
        let addr = server.handle.local_addr();
        drop(server);
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(addr).is_ok() {
            assert!(Instant::now() < deadline, "still listening");
            thread::yield_now();
        }
    }
}
