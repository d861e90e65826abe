//! A single GET to an endpoint, on a connection of its own: health checks and lists of models.

use std::{io, net::SocketAddr, pin::pin};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Uri, header, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use super::{local_fault::connect_error, tls::EndpointTls};
use crate::config::AppProtocol;

#[derive(Debug, Error)]
pub enum SingleError {
    #[error("connecting failed: {0}")]
    Connect(io::Error),
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("no valid response: {0}")]
    Http(#[from] hyper::Error),
    #[error("the body is broken, or longer than {0} bytes")]
    Body(usize),
}

/// An endpoint, and how it is spoken to.
#[derive(Clone, Copy)]
pub struct SingleRequest<'a> {
    pub address: SocketAddr,
    pub protocol: AppProtocol,
    pub tls: Option<&'a EndpointTls>,
}

impl SingleRequest<'_> {
    /// Sends a GET with these fields. Returns the response, whose body has at most `limit` bytes; 0 does not read it.
    pub async fn get(
        self,
        path: &PathAndQuery,
        headers: HeaderMap,
        limit: usize,
    ) -> Result<Response<Bytes>, SingleError> {
        let refused = |error| SingleError::Connect(connect_error(error, self.address));
        let tcp = TcpStream::connect(self.address).await.map_err(refused)?;
        match self.tls {
            None => self.ask(tcp, path, headers, limit).await,
            Some(tls) => {
                let io = tls.connect(tcp, self.address).await.map_err(SingleError::Tls)?;
                self.ask(io, path, headers, limit).await
            }
        }
    }

    async fn ask(
        self,
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        path: &PathAndQuery,
        mut headers: HeaderMap,
        limit: usize,
    ) -> Result<Response<Bytes>, SingleError> {
        let io = TokioIo::new(io);
        let mut request = Request::new(Empty::<Bytes>::new());
        match self.protocol {
            AppProtocol::Http1 | AppProtocol::Https => {
                let (mut sender, connection) = http1::handshake(io).await?;
                if let Ok(host) = HeaderValue::from_str(&self.address.to_string()) {
                    headers.entry(header::HOST).or_insert(host);
                }
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
                (*request.uri_mut(), *request.headers_mut()) = (path.clone().into(), headers);
                during(connection, answer(sender.send_request(request), limit)).await
            }
            AppProtocol::H2c => {
                let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                let host = headers.remove(header::HOST);
                let authority = host.as_ref().and_then(|host| host.to_str().ok()).map(str::to_owned);
                let uri =
                    |authority| Uri::builder().scheme("http").authority(authority).path_and_query(path.clone()).build();
                let address = self.address.to_string();
                let uri = uri(authority.unwrap_or_else(|| address.clone())).or_else(|_| uri(address));
                (*request.uri_mut(), *request.headers_mut()) = (uri.unwrap_or_default(), headers);
                during(connection, answer(sender.send_request(request), limit)).await
            }
        }
    }
}

async fn answer(
    response: impl Future<Output = hyper::Result<Response<Incoming>>>,
    limit: usize,
) -> Result<Response<Bytes>, SingleError> {
    let (head, body) = response.await?.into_parts();
    if limit == 0 {
        return Ok(Response::from_parts(head, Bytes::new()));
    }
    let body = Limited::new(body, limit).collect().await.map_err(|_| SingleError::Body(limit))?;
    Ok(Response::from_parts(head, body.to_bytes()))
}

/// Drives the connection until the work is done.
async fn during<T>(connection: impl Future, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    tokio::select! {
        done = &mut work => done,
        // The connection ended, with or without a response.
        _ = connection => work.await,
    }
}
