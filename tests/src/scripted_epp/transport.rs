//! The scripted picker's TCP connections, which a script can close or reset underneath tonic.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::transport::server::Connected;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    None,
    Fin,
    Reset,
}

/// Cuts one connection; tonic passes it to each stream of that connection.
#[derive(Clone)]
pub(super) struct Cutter {
    /// The connection's number, from 1.
    pub(super) number: u64,
    cut: Arc<watch::Sender<Cut>>,
}

impl Cutter {
    pub(super) fn cut(&self, how: Cut) {
        self.cut.send_replace(how);
    }
}

pub(super) struct Incoming {
    stream: TcpStream,
    cutter: Cutter,
    /// Resolves when the connection is to be cut.
    cut: BoxFuture<'static, Cut>,
    open: Arc<AtomicU64>,
}

impl Incoming {
    /// `all` cuts every other connection too.
    pub(super) fn new(stream: TcpStream, number: u64, open: &Arc<AtomicU64>, mut all: watch::Receiver<Cut>) -> Self {
        let _ = stream.set_nodelay(true);
        open.fetch_add(1, Ordering::Relaxed);
        let (sender, mut own) = watch::channel(Cut::None);
        let cut = async move {
            tokio::select! {
                how = wanted(&mut own) => how,
                how = wanted(&mut all) => how,
            }
        };
        Self { stream, cutter: Cutter { number, cut: Arc::new(sender) }, cut: cut.boxed(), open: Arc::clone(open) }
    }

    pub(super) fn reset(self) {
        self.reset_on_close();
    }

    fn reset_on_close(&self) {
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// Returns an error once the connection is cut; the caller drops the connection, which closes it.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        // Not polled again after it resolves, because the connection is dropped then.
        match self.cut.poll_unpin(cx) {
            Poll::Pending => return Ok(()),
            Poll::Ready(Cut::Reset) => self.reset_on_close(),
            Poll::Ready(_) => {}
        }
        self.cut = std::future::ready(Cut::Fin).boxed();
        Err(ErrorKind::ConnectionReset.into())
    }
}

/// A dropped sender cuts nothing.
async fn wanted(cut: &mut watch::Receiver<Cut>) -> Cut {
    let how = cut.wait_for(|cut| *cut != Cut::None).await.map(|how| *how);
    match how {
        Ok(how) => how,
        Err(_) => std::future::pending().await,
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connected for Incoming {
    type ConnectInfo = Cutter;

    fn connect_info(&self) -> Cutter {
        self.cutter.clone()
    }
}

impl AsyncRead for Incoming {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
