//! Accepts the connections of `penstock epp`: bounded in number, in the time until they speak HTTP/2, and by the descriptors that
//! the process may open.

use std::{
    io::{self, Cursor},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::{Connected, TcpConnectInfo};

use super::{
    bounds::{EppServerLimits, Quota, Reservation},
    refusals::Refusals,
};
use crate::http::empty_data::WithoutEmptyData;
use crate::reserve::{Reserve, is_exhausted, is_of_the_connection};

/// Length of the client's connection preface (RFC 9113 §3.4).
const PREFACE: usize = 24;
/// Time between two attempts while the process has no descriptor, or memory, for another connection.
const EXHAUSTED: Duration = Duration::from_millis(50);

/// Connections that have sent HTTP/2's preface, after their TLS handshake if `tls` is set. Those above the limit are closed
/// immediately, those that take longer than [`EppServerLimits::opening`] then.
pub(super) fn incoming(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    limits: &EppServerLimits,
    refusals: Arc<Refusals>,
) -> impl Stream<Item = io::Result<OpenedConnection>> {
    let EppServerLimits { connections, opening, .. } = *limits;
    let quota = Quota::new(connections);
    let accepting = (listener, Reserve::new(1), Arc::clone(&refusals));
    let accepted = stream::unfold(accepting, async |(listener, mut reserve, refusals)| {
        let stream = accept(&listener, &mut reserve, &refusals).await;
        Some((stream, (listener, reserve, refusals)))
    });
    let open = move |stream: TcpStream| {
        let (place, tls, refusals) = (quota.one(), tls.clone(), Arc::clone(&refusals));
        async move {
            let Some(place) = place else {
                refusals.add("connections");
                return None;
            };
            let opened = timeout(opening, OpenedConnection::over(stream, tls, place)).await;
            if opened.is_err() {
                refusals.add("opening");
            }
            // A client that closes its connection, or does not accept the certificate, was not refused.
            opened.ok()?.ok()
        }
    };
    // One more than there are places, so that a further client is refused while all of them are opening.
    accepted.map(open).buffer_unordered(connections.saturating_add(1)).filter_map(|opened| async { opened.map(Ok) })
}

/// The next connection. While the process is out of descriptors, new ones are closed.
async fn accept(listener: &TcpListener, reserve: &mut Reserve, refusals: &Refusals) -> TcpStream {
    loop {
        reserve.refill();
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if is_exhausted(&error) => {
                refusals.add("descriptors");
                if reserve.release()
                    && let Some(Ok((stream, _))) = listener.accept().now_or_never()
                {
                    reserve.reclaim(stream);
                }
                sleep(EXHAUSTED).await;
            }
            // The client or its network is gone already: accept(2), "Error handling".
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                refusals.add("accept");
                sleep(EXHAUSTED).await;
            }
        }
    }
}

/// What a connection is read from and written to.
trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A connection that speaks HTTP/2. It is counted until it is dropped.
pub(super) struct OpenedConnection {
    stream: Box<dyn ByteStream>,
    info: TcpConnectInfo,
    _place: Reservation,
}

impl OpenedConnection {
    async fn over(stream: TcpStream, tls: Option<TlsAcceptor>, place: Reservation) -> io::Result<Self> {
        let info = stream.connect_info();
        stream.set_nodelay(true)?;
        let stream = match tls {
            None => prefaced(stream).await?,
            Some(tls) => prefaced(tls.accept(stream).await?).await?,
        };
        Ok(Self { stream, info, _place: place })
    }
}

/// Waits for the preface. Whether it is right, the server decides.
async fn prefaced(mut stream: impl ByteStream + 'static) -> io::Result<Box<dyn ByteStream>> {
    let mut preface = [0; PREFACE];
    stream.read_exact(&mut preface).await?;
    let (rest, write) = tokio::io::split(stream);
    Ok(Box::new(tokio::io::join(Cursor::new(preface).chain(WithoutEmptyData::new(rest)), write)))
}

impl Connected for OpenedConnection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.info.clone()
    }
}

impl AsyncRead for OpenedConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for OpenedConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
